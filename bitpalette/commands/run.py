"""`quantize run`: a checkpoint in, a packed one out."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .plan import Batch, Context, Memory, Palette, PlannerOptions, Refine, Serve, Size, Threads, TokensPerSecond
from .run_plan import RunBudget, bless, plan_for_run
from .text import duration, peak_memory, size, sized


def register(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    model: Annotated[str, typer.Argument(help="A transformers folder, a .gguf file, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; new, empty, or of an interrupted run.")],
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight. Alone: on average, planned (`quantize plan`). With --uniform or a method, of every "
            "linear layer: 1 to 5 in sixteenths, 6 to 8; 16 converts only.",
            show_default="4, uniform",
        ),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The same bits in every linear layer.")] = False,
    size_: Size = None,
    memory: Memory = None,
    context: Context = None,
    batch: Batch = 1,
    tokens_per_second: TokensPerSecond = None,
    threads: Threads = None,
    palette: Palette = None,
    serve: Serve = None,
    refine: Refine = 1,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan that `quantize plan` found, in place of a budget.")
    ] = None,
    verify_kl: Annotated[
        float | None,
        typer.Option(help="With a plan: most KL divergence from MODEL, nats a token; more is a failure."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A method by name: trellis, gptq, awq, nf4, higgs, mxfp4, nvfp4, squeezellm.", show_default="trellis"
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(help="fast, normal, or best: how long to search for trellis codes; best tunes afterwards.")
    ] = "normal",
    codec: Annotated[
        str | None,
        typer.Option(
            help="trellis, int (uniform levels), lut (a table) or float (fp4, fp6, fp8).", show_default="the preset's"
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="rtn, gptq, ldlq, awq, or awq+gptq.", show_default="the preset's")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale; 0 is the whole row. Not of trellis.", show_default="64"),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point for each scale.")] = False,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Rotate inputs first.", show_default="with feedback")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold the rotation into neighbouring weights: faster, less exact.")
    ] = False,
    calib: Annotated[str, typer.Option(help="Calibration text: a file, builtin, or self.")] = "builtin",
    calib_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 16384,
    seq_len: Annotated[int, typer.Option(help="Tokens of one calibration sequence.")] = 512,
    keep: Annotated[list[str] | None, typer.Option(help="Pattern of weights to keep at 16 bits.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="PATTERN=SCHEME, such as 'down_proj=bits=8'.")] = None,
    head_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits of the output head; 16 keeps it. Alone, it is meant for both.",
            show_default="trellis: one more than the layers; else 8",
        ),
    ] = None,
    embed_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits of embeddings; 16 keeps them. Alone, it is meant for both.", show_default="as the head"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random signs and self-written text.")] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder of an unfinished run's state.", show_default="in OUT")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Folder of reusable statistics of the original model; collected if new.")
    ] = None,
    tune_minutes: Annotated[
        float | None, typer.Option(help="Time box of --effort best's tuning.", show_default="none")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and print the sizes; write nothing.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what calibration computes in.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize MODEL into OUT. Interrupted, the same command goes on where it stopped, to the same result."""
    from .._version import __version__
    from ..api import prepare_compilation
    from ..calibrate.device import choose_device
    from ..calibrate.plan import Plan, PlanError
    from ..calibrate.text import Calibration
    from ..formats.kv_plan_file import write_kv_plan
    from ..formats.plan_file import PLAN_NAME, encoded
    from ..plan_result import planned_cache
    from ..recipe import make_plan

    shard = sized("--max-shard-size", max_shard_size)
    if dtype not in ("float32", "bfloat16"):
        raise PlanError(f"--dtype is float32 or bfloat16; got {dtype!r}")
    choose_device(device)  # before anything is read
    if tune_minutes is not None and not (effort == "best" and tune_minutes > 0):
        raise PlanError(f"--tune-minutes {tune_minutes:g}: minutes above 0, with --effort best")
    calibration = Calibration(calib, calib_tokens, seq_len, seed)
    method = {"--preset": preset, "--codec": codec, "--solver": solver, "--group-size": group_size}
    method |= {"--asymmetric": asymmetric or None, "--rotate": rotate, "--fold": fold or None}
    stored, folder = plan_for_run(
        model,
        out,
        plan_file,
        RunBudget(
            bits=bits,
            uniform=uniform,
            size=size_,
            memory=memory,
            context=context,
            batch=batch,
            tokens_per_second=tokens_per_second,
            threads=threads,
            method=[name for name, value in method.items() if value is not None],
        ),
        PlannerOptions(palette, effort, keep, set_, head_bits, embed_bits, serve, calibration, device),
        stats,
        refine,
        dry_run,
    )
    if verify_kl is not None and (stored is None or not verify_kl > 0):
        raise PlanError(f"--verify-kl {verify_kl:g}: nats a token above 0, with a plan")
    plan = make_plan(
        bits=bits if stored is None else None,
        preset=preset,
        effort=effort,
        codec=codec,
        solver=solver,
        group_size=group_size,
        asymmetric=asymmetric,
        rotate=rotate,
        head_bits=head_bits,
        embed_bits=embed_bits,
        keep=keep or (),
        set_=set_ or (),
        seed=seed,
        fold=fold,
    )
    kv = None
    if stored is not None:
        plan = Plan.from_dict(stored.plan)
        kv = planned_cache(stored, folder)
    compilation = prepare_compilation(
        model,
        out,
        plan,
        calibration=calibration,
        dtype=dtype,
        max_shard_bytes=shard,
        work=work,
        stats=folder,
        tune_seconds=None if tune_minutes is None else 60 * tune_minutes,
        device=device,
        beside={} if stored is None else {PLAN_NAME: encoded(stored)},
    )
    if dry_run:
        print_sizes(compilation, json_output)
        return
    compile_with_progress(compilation, json_output)
    if stored is not None:
        if kv is not None:
            write_kv_plan(out, kv, __version__)
        bless(compilation, stored, calibration, verify_kl, json_output)
        if stats is None and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def print_sizes(compilation: Any, as_json: bool) -> None:
    from rich.console import Console

    sizes = compilation.sizes()
    if as_json:
        print(json.dumps(asdict(sizes) | _rates(sizes)))
        return
    console = Console(soft_wrap=True, highlight=False)
    for name, n in sizes.files.items():
        console.print(f"{name}  {n:,} bytes")
    console.print(
        f"weights {size(sizes.source_bytes)} -> {size(sizes.file_bytes)} ({sizes.file_bytes:,} bytes); "
        f"{sizes.bits_per_weight:.3f} bits over {sizes.quantized_weights:,} quantized weights, "
        f"{sizes.file_bits_per_weight:.3f} over the file"
    )


def compile_with_progress(compilation: Any, as_json: bool) -> dict[str, Any]:
    """Run it, telling what happens on stderr; the summary on stdout. Returns what `--json` prints."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..calibrate.expect import expected_seconds

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    start = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("quantizing", total=None)
        console = progress.console

        def layer(record: Any, seconds: float) -> None:
            console.print(
                f"{record.parameter}  {record.scheme}  {record.bits_per_weight:.3f} bits  "
                f"error {record.error:.2e}  {seconds:.1f} s"
                + (f"  {n:.0f} rows with a wider scale" if (n := record.notes.get("rows_recoded")) else "")
            )

        compilation.events.layer = layer
        compilation.events.part = lambda done, of: progress.update(task, completed=done, total=of)
        compilation.events.note = lambda text: console.print(text)
        tuning: list[Any] = []

        def tuned(done: int, steps: int, kl: float, left: float) -> None:
            if not tuning:
                tuning.append(progress.add_task("tuning", total=steps))
            progress.update(tuning[0], completed=done, total=steps, description=f"tuning, held-out KL {kl:.4f}")

        compilation.events.tuning = tuned

        def begin() -> None:
            expected = duration(expected_seconds(compilation))
            console.print(f"{_what(compilation.plan)}: about {expected} on this machine")

        compilation.events.begin = begin
        records = compilation.run()
    sizes = compilation.sizes()
    summary = {
        "out": str(compilation.out),
        "layers": [asdict(r) for r in records],
        **_rates(sizes),
        "file_bytes": sizes.file_bytes,
        "source_bytes": sizes.source_bytes,
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_bytes": peak_memory(),
    }
    if as_json:
        print(json.dumps(summary))
        return summary
    Console(soft_wrap=True, highlight=False).print(
        f"{compilation.out}: {len(records)} weights at {sizes.bits_per_weight:.3f} bits, "
        f"{sizes.file_bits_per_weight:.3f} over the file; {size(sizes.source_bytes)} -> {size(sizes.file_bytes)}; "
        f"{duration(summary['seconds'])}, peak memory {size(summary['peak_memory_bytes'])}\n"
        'load it with: import bitpalette; AutoModelForCausalLM.from_pretrained("' + str(compilation.out) + '")'
    )
    return summary


def _what(plan: Any) -> str:
    """The method in a few words."""
    if plan.linear is None:
        return "keeping the layers at 16 bits"
    return f"{plan.linear}, solver {plan.solver}" + (", then tuning" if plan.tune else "")


def _rates(sizes: Any) -> dict[str, float]:
    return {
        "bits_per_weight": round(sizes.bits_per_weight, 6),
        "file_bits_per_weight": round(sizes.file_bits_per_weight, 6),
    }
