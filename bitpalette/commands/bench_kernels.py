"""`quantize bench kernels`: every kernel and instruction set on the shapes of real models, against the speed at which
memory can be read and against torch (docs/kernels.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .picture import check_plot, write_picture
from .text import parse_size

if TYPE_CHECKING:
    from ..kernel_bench.rows import Row
    from ..kernel_bench.run import Settings

Many = list[str] | None

DASHES = ("--", "-", "-.", ":", "--")
"""Of torch's linear layers in the picture."""


def kernels(
    shape: Annotated[Many, typer.Option(help="OUTxIN; may be repeated.", show_default="4096x4096")] = None,
    model: Annotated[
        Many, typer.Option(help="smollm2-135m, llama-1b, llama-8b, qwen-7b, awkward, or all; may be repeated.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Rows of the input; may be repeated.", show_default="1, 2, 4, 8, 16, 64, 256, 512"),
    ] = None,
    scheme: Annotated[
        Many,
        typer.Option(
            help="As `run --set` takes them, such as 'int,bits=4,group_size=128'; may be repeated.",
            show_default="int 2, 3, 4, 8; lut 2, 3, 4; trellis 2, 2.5, 3, 4",
        ),
    ] = None,
    kernel: Annotated[
        Many, typer.Option(help="A kernel by its name; may be repeated.", show_default="all that can")
    ] = None,
    isa: Annotated[
        Many, typer.Option(help="An instruction set; may be repeated.", show_default="all of the machine")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="May be repeated.", show_default="torch's")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of inputs and outputs: float32, bfloat16 or float16.",
            show_default="float32; on a GPU float16",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    store: Annotated[
        bool, typer.Option("--store", help="Choose kernels by these times from now on, for this GPU's layers.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="In each, every kernel runs once.")] = 32,
    seconds: Annotated[
        float, typer.Option(help="For one kernel at one count of tokens, about: slow ones take part in fewer rounds.")
    ] = 1.0,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: what the process computed, for one thread on a shared machine.")
    ] = "wall",
    memory: Annotated[str, typer.Option(help="Most that all copies of the weights may take.")] = "1GiB",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="File to write all figures to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time of one linear layer with each kernel, interleaved with torch's own and with a loop that only reads.

    On a GPU: in CUDA graphs, beside cuBLAS and a device copy.

    Exit code 1 where a kernel computed something wrong: it is not timed then.
    """
    from ..calibrate.plan import PlanError
    from ..formats.atomic import write_atomically
    from ..kernel_bench.gpu_run import measure_on_gpu, store_rows
    from ..kernel_bench.rows import to_csv
    from ..kernel_bench.run import measure
    from ..kernel_bench.shapes import SCHEMES, choose_layers, choose_schemes

    check_plot(plot)
    _check_csv(csv)
    layers, schemes = choose_layers(shape or (), model or ()), choose_schemes(scheme or SCHEMES)
    settings = _settings(tokens, isa, kernel, threads, dtype, rounds, seconds, clock, memory, seed, device)
    if store and settings.device.type == "cpu":
        raise PlanError("--store is for GPUs, whose kernels are chosen by measured times: add --device cuda")
    rows: list[Row] = []
    with _progress() as step:
        for some in (measure if settings.device.type == "cpu" else measure_on_gpu)(layers, schemes, settings, step):
            rows += some
            if csv is not None:  # after each: hours of measurements survive an interruption
                write_atomically(csv, to_csv(rows).encode())
    if store:
        path = store_rows(rows, schemes, rows[0].device)
        print(f"kernels of these shapes are chosen by {path}", file=sys.stderr)
    if json_output:
        print(json.dumps({"about": _about(settings), "rows": [asdict(row) for row in rows]}))
    else:
        _print_tables(rows, settings)
    if plot is not None:
        _write_plot(plot, rows)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _settings(
    tokens: list[int] | None,
    isa: Many,
    kernel: Many,
    threads: list[int] | None,
    dtype: str | None,
    rounds: int,
    seconds: float,
    clock: str,
    memory: str,
    seed: int,
    device: str,
) -> Settings:
    import torch

    from ..calibrate.device import choose_device
    from ..calibrate.plan import PlanError
    from ..kernel_bench.gpu_rounds import l2_bytes
    from ..kernel_bench.rounds import FEWEST_ROUNDS
    from ..kernel_bench.run import Settings, cache_bytes, check_clock, choose_isas, choose_kernels
    from ..kernel_bench.shapes import TOKENS

    for name, given in (("--tokens", tokens), ("--threads", threads)):
        for n in given or ():
            if n < 1:
                raise PlanError(f"{name} is at least 1; got {n}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise PlanError(f"--dtype is one of {list(dtypes)}; got {dtype!r}")
    where = choose_device(device)
    on_cpu = where.type == "cpu"
    if not on_cpu:
        for option, value in (("--isa", isa), ("--threads", threads)):
            if value:
                raise PlanError(f"{option} is of CPU kernels; leave it out with --device {device}")
        if clock != "wall":
            raise PlanError(f"--clock {clock} is of CPU kernels; a GPU's time is taken by CUDA events")
        if dtype == "float32":
            raise PlanError(f"--dtype float32 with --device {device}: its kernels multiply float16 and bfloat16")
    dtype = dtype or ("float32" if on_cpu else "float16")
    if rounds < FEWEST_ROUNDS:
        raise PlanError(f"--rounds is at least {FEWEST_ROUNDS}; got {rounds}")
    if not 0 < seconds < float("inf"):
        raise PlanError(f"--seconds is above 0; got {seconds:g}")
    if not 0 <= seed < 1 << 63:
        raise PlanError(f"--seed is 0 to 2**63 - 1; got {seed}")
    try:
        nbytes = parse_binary_size(memory)
    except (ValueError, OverflowError):
        raise PlanError(f"--memory {memory!r} is no size such as 1GiB or 800MB") from None
    if nbytes < 1 << 20:
        raise PlanError(f"--memory is at least 1MiB; got {memory!r}")
    chosen = tuple(dict.fromkeys(threads or [torch.get_num_threads()]))
    check_clock(clock, chosen)
    return Settings(
        tokens=tuple(sorted(set(tokens or TOKENS))),
        isas=choose_isas(isa or ()) if on_cpu else (),
        kernels=choose_kernels(kernel or ()),
        threads=chosen,
        dtype=dtypes[dtype],
        rounds=rounds,
        seconds=seconds,
        memory=nbytes,
        cache=cache_bytes() if on_cpu else l2_bytes(where),
        seed=seed,
        clock=clock,
        device=where,
    )


def parse_binary_size(text: str) -> int:
    """ "1GiB" -> 1073741824; decimal units as `parse_size`. ValueError otherwise."""
    number = text.strip().upper()
    for unit, factor in (("GIB", 1 << 30), ("MIB", 1 << 20), ("KIB", 1 << 10)):
        if number.endswith(unit):
            return int(float(number[: -len(unit)]) * factor)
    return parse_size(text)


def _check_csv(path: Path | None) -> None:
    from ..calibrate.plan import PlanError

    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise PlanError(f"--csv {path}: {'a folder' if path.is_dir() else f'the folder {path.parent} does not exist'}")


@contextmanager
def _progress() -> Iterator[Any]:
    """step(text): what is being measured, on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("making weights") as status:
        yield status.update


def _about(settings: Settings) -> dict[str, Any]:
    """What the figures depend on."""
    from .. import __version__
    from ..kernel_bench import gpu_rounds, gpu_run, rounds
    from ..provenance import commit, last_level_cache, processor

    on_cpu = settings.device.type == "cpu"
    margin = rounds.MARGIN if on_cpu else gpu_rounds.MARGIN
    return {
        "device": processor() if on_cpu else gpu_run.device_name(settings.device),
        "commit": commit(),
        "bitpalette": __version__,
        "threads": list(settings.threads),
        "isas": list(settings.isas),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "clock": settings.clock if on_cpu else gpu_run.CLOCK,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "memory": settings.memory,
        "cache": settings.cache,
        "cache_assumed": on_cpu and last_level_cache() is None,
        "footprint_wanted": int(margin * settings.cache),
        "seed": settings.seed,
    }


def _print_tables(rows: Sequence[Row], settings: Settings) -> None:
    """One table for each shape, count of tokens and number of threads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    measured = dict.fromkeys((r.layer, r.out_features, r.in_features, r.tokens, r.threads) for r in rows)
    for key in measured:
        layer, out, n, tokens, threads = key
        some = [r for r in rows if (r.layer, r.out_features, r.in_features, r.tokens, r.threads) == key]
        title = f"{layer} {out} x {n}, tokens: {tokens}{f', threads: {threads}' if threads else ''}".strip()
        table = Table(box=None, title=title, title_justify="left", title_style="bold")
        for column in ("scheme", "kernel", "isa"):
            table.add_column(column, overflow="fold")
        names = [name for name, _ in _baselines(settings)]
        speeds = (*names, *(("x 1 thread",) if _several_threads(some) else ()))
        share = "of read" if settings.device.type == "cpu" else "of copy"
        for column in ("bits", "rounds", "median us", "p20", "p80", "Gw/s", "GB/s", share, *speeds, "error"):
            table.add_column(column, justify="right")
        scheme = some[0].scheme
        for r in some:
            if r.scheme != scheme and not r.kernel.startswith("torch."):
                table.add_section()
            scheme = r.scheme
            if r.median_us is not None:
                table.add_row(*_cells(r, settings, _several_threads(some)))
        console.print(table)
        _print_notes(console, some)
        console.print()
    about = _about(settings)
    console.print(
        f"{about['device']}; {about['dtype']}; last-level cache {settings.cache >> 20} MiB"
        f"{' (assumed)' if about['cache_assumed'] else ''}; up to {settings.rounds} rounds, {about['clock']} time; "
        f"commit {about['commit'] or 'unknown'}"
    )


def _baselines(settings: Settings) -> list[tuple[str, str]]:
    """(column, field of a row) of the speeds over torch's linear layers."""
    if settings.device.type != "cpu":
        return [("x fp16", "x_float16"), ("x bf16", "x_bfloat16")]
    return [("x fp32", "x_float32"), ("x bf16", "x_bfloat16"), ("x int4", "x_int4"), ("x int8", "x_int8")]


def _cells(r: Row, settings: Settings, with_one_thread: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        *(r.scheme, r.kernel, r.isa),
        number(r.packed_bits, ".3f"),
        str(r.rounds or ""),
        *(number(v, ".1f") for v in (r.median_us, r.p20_us, r.p80_us)),
        *(number(v, ".2f") for v in (r.gweights_per_s, r.gbytes_per_s)),
        number(r.read_share, ".0%"),
        *(number(getattr(r, name), ".2f") for _, name in _baselines(settings)),
        *((number(r.x_one_thread, ".2f"),) if with_one_thread else ()),
        number(r.error, ".1e"),
    ]


def _several_threads(rows: Sequence[Row]) -> bool:
    """Whether rows of more than one thread were held against those of one."""
    return any(r.threads > 1 and r.x_one_thread is not None for r in rows)


def _print_notes(console: Any, rows: Sequence[Row]) -> None:
    """What was not timed and why, a line each; that weights came from the cache, once."""
    from rich.text import Text

    for r in (r for r in rows if r.median_us is None):
        name = " ".join(" ".join((r.kernel, r.isa, r.scheme)).split())
        console.print(Text(f" {name}: {r.note}", style="red" if r.wrong else ""), soft_wrap=True)
    cached = [r.note for r in rows if r.from_memory is False]
    if cached:
        console.print(Text(f" {cached[0]}"), soft_wrap=True)


def _write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed over torch's bf16 linear by the count of tokens, a picture for each shape, each scheme's fastest kernel."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from ..kernel_bench.baselines import NAMES
    from ..kernel_bench.gpu_contenders import TORCH

    timed = [r for r in rows if r.x_bfloat16 is not None]
    panels = list(dict.fromkeys((r.out_features, r.in_features, r.threads) for r in timed))
    wide = min(2, max(1, len(panels)))
    high = max(1, -(-len(panels) // wide))
    figure = Figure(figsize=(7 * wide, 4.5 * high + 1), layout="constrained")
    schemes = dict.fromkeys(r.scheme for r in timed if r.kernel not in (*NAMES, *TORCH))
    styles: dict[str, Any] = {k: {"color": colormaps["tab20"](i % 20)} for i, k in enumerate(schemes)}
    styles |= {k: {"linestyle": v, "color": "grey"} for k, v in zip((*NAMES, "torch.float16"), DASHES, strict=True)}
    grid = figure.subplots(high, wide, squeeze=False)
    for i, (out, n, threads) in enumerate(panels):
        axes = grid[i // wide][i % wide]
        here = [r for r in timed if (r.out_features, r.in_features, r.threads) == (out, n, threads)]
        for name in dict.fromkeys(r.scheme if not r.kernel.startswith("torch.") else r.kernel for r in here):
            best: dict[int, float] = {}
            for r in here:
                if name in (r.kernel, r.scheme) and r.x_bfloat16 is not None:
                    best[r.tokens] = max(best.get(r.tokens, 0.0), r.x_bfloat16)
            axes.plot(list(best), list(best.values()), marker=".", label=name, **styles[name])
        axes.set(yscale="log", xlabel="tokens", ylabel="speed over torch's bf16 linear")
        counts = sorted({r.tokens for r in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        on = f"{threads} thread{'s' if threads > 1 else ''}, " if threads else ""
        axes.set_title(f"{out} x {n}, {on}{here[0].device}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if panels:
        handles = {label: h for a in grid.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    write_picture(path, figure)
