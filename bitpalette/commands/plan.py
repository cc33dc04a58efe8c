"""`quantize plan`: which weight gets which bits, within what can be afforded; `quantize pareto`: several budgets."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .phases import phases
from .text import duration, size, sized

if TYPE_CHECKING:
    from ..calibrate.text import Calibration
    from ..formats.kv_plan_file import StoredKVPlan
    from ..formats.plan_file import StoredPlan
    from ..plan_budget import Budget
    from ..planning import Planner

OUT = Path("quantization_plan.json")
PARETO = Path("pareto.json")
CACHE_TOKENS, CACHE_LENGTHS, CACHE_WINDOW, CACHE_MIXES = 8192, (512, 2048), 64, 4
"""How the cache is measured; `quantize plan-kv` says what these are."""

SENSITIVITY_TOKENS = 4096

STATS = ".stats"
"""Behind the plan's name: the folder of what was measured, where none is named."""

Model = Annotated[str, typer.Argument(help="A transformers folder, a .gguf file, or a hub id.")]
Calib = Annotated[str, typer.Option(help="Calibration text: a file, builtin, or self.")]
CalibTokens = Annotated[int, typer.Option(help="Tokens to calibrate on.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of one calibration sequence.")]
Size = Annotated[str | None, typer.Option("--size", help="Budget of a plan: of the files, such as 90MB.")]
Memory = Annotated[
    str | None, typer.Option(help="Budget: of a process that runs it, such as 6GB; weights and cache share it.")
]
Context = Annotated[int | None, typer.Option(help="With --memory: tokens of a row.")]
Batch = Annotated[int, typer.Option(help="With --memory: rows.")]
TokensPerSecond = Annotated[
    float | None, typer.Option(help="Budget: of one row, decoding on this machine, measured as far as it is not known.")
]
Threads = Annotated[
    int | None, typer.Option(help="With --tokens-per-second: threads that will run it.", show_default="torch's")
]
Palette = Annotated[
    list[str] | None,
    typer.Option(
        help="Schemes to choose from: trellis, int, lut, float, with bits as in trellis=2/2.5/3 or int=4/8.",
        show_default="trellis,int=6/8",
    ),
]
Effort = Annotated[str, typer.Option(help="fast, normal or best, as of `quantize run`.")]
Keep = Annotated[list[str] | None, typer.Option(help="Pattern of weights to keep at 16 bits.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="PATTERN=SCHEME: these get this scheme.")]
HeadBits = Annotated[
    float | None, typer.Option(help="Bits of the output head; 16 keeps it.", show_default="in the plan")
]
EmbedBits = Annotated[float | None, typer.Option(help="Bits of embeddings; 16 keeps them.", show_default="in the plan")]
Serve = Annotated[str | None, typer.Option(help="vllm: weights that it fuses share a scheme.")]
Refine = Annotated[int, typer.Option(help="Rounds of measuring true KL divergences and planning again.")]
SensitivityTokens = Annotated[int, typer.Option(help="Tokens that sensitivities are measured on.")]
Stats = Annotated[
    Path | None,
    typer.Option(help="Folder of what is measured; further plans reuse it.", show_default="beside the plan"),
]
Seed = Annotated[int, typer.Option(help="Of random signs, labels and self-written text.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
    app.command("pareto")(pareto)


def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="File for the plan.")] = OUT,
    bits: Annotated[
        float | None, typer.Option(help="Bits a weight on average over quantized weights, scales counted.")
    ] = None,
    size_: Size = None,
    memory: Memory = None,
    context: Context = None,
    batch: Batch = 1,
    tokens_per_second: TokensPerSecond = None,
    threads: Threads = None,
    palette: Palette = None,
    effort: Effort = "normal",
    keep: Keep = None,
    set_: Set = None,
    head_bits: HeadBits = None,
    embed_bits: EmbedBits = None,
    serve: Serve = None,
    refine: Refine = 1,
    calib: Calib = "builtin",
    calib_tokens: CalibTokens = 65536,
    seq_len: SeqLen = 512,
    sensitivity_tokens: SensitivityTokens = SENSITIVITY_TOKENS,
    stats: Stats = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Find the bits of every weight of MODEL that cost least KL divergence within a budget; `quantize run --plan` runs
    the plan. What was measured is kept: another budget then takes seconds."""
    from ..calibrate.text import Calibration
    from ..formats.plan_file import write_plan

    budget = budget_of(bits, size_, memory, context, batch, tokens_per_second, threads)
    check_place(out)
    started = time.monotonic()

    stored = with_planner(
        lambda planner: planned(planner, budget, refine),
        model,
        stats or out.with_suffix(STATS),
        PlannerOptions(
            palette,
            effort,
            keep,
            set_,
            head_bits,
            embed_bits,
            serve,
            Calibration(calib, calib_tokens, seq_len, seed),
            device,
            sensitivity_tokens,
        ),
    )
    write_plan(out, stored)
    if json_output:
        print(json.dumps({"out": str(out), **summary_of(stored), "seconds": round(time.monotonic() - started, 2)}))
        return
    show(stored, out, time.monotonic() - started)


def pareto(
    model: Model,
    bits: Annotated[str, typer.Option(help="Average bits, with commas between.")] = "2,2.5,3,3.5,4",
    out: Annotated[Path, typer.Option(help="File for the points.")] = PARETO,
    plot: Annotated[Path | None, typer.Option(help="A .png of them.")] = None,
    palette: Palette = None,
    effort: Effort = "normal",
    keep: Keep = None,
    set_: Set = None,
    head_bits: HeadBits = None,
    embed_bits: EmbedBits = None,
    serve: Serve = None,
    calib: Calib = "builtin",
    calib_tokens: CalibTokens = 65536,
    seq_len: SeqLen = 512,
    sensitivity_tokens: SensitivityTokens = SENSITIVITY_TOKENS,
    stats: Stats = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Predicted KL divergence of MODEL at several average bits, all solved from one calibration and measured in one
    pass through the model (with the quickest search for trellis codes)."""
    from ..calibrate.text import Calibration
    from ..formats.atomic import write_atomically
    from ..plan_budget import Budget
    from ..plan_refine import Refinement
    from .evaluate import numbers
    from .picture import check_plot

    budgets = [Budget(bits=b) for b in numbers("--bits", bits, 1, 8, float)]
    check_place(out)
    check_plot(plot)

    def found(planner: Planner) -> list[dict[str, Any]]:
        for budget in budgets:
            planner.check(budget)
        planner.measure()
        return Refinement(planner).front(budgets)

    points = with_planner(
        found,
        model,
        stats or out.with_suffix(STATS),
        PlannerOptions(
            palette,
            effort,
            keep,
            set_,
            head_bits,
            embed_bits,
            serve,
            Calibration(calib, calib_tokens, seq_len, seed),
            device,
            sensitivity_tokens,
        ),
    )
    write_atomically(out, json.dumps(points, indent=1).encode())
    if plot is not None:
        draw_front(points, plot)
    if json_output:
        print(json.dumps(points))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("bits", "files", "KL predicted", "measured", box=None)
    for p in points:
        table.add_row(
            f"{p['bits']:.3f}",
            size(p["bytes"]),
            f"{p['predicted']:.4f}",
            f"{p['measured']:.4f} ± {p['measured_se']:.4f}",
        )
    Console().print(table)


@dataclass(frozen=True)
class PlannerOptions:
    """The options of every command that plans, as they were given."""

    palette: list[str] | None
    effort: str
    keep: list[str] | None
    set_: list[str] | None
    head_bits: float | None
    embed_bits: float | None
    serve: str | None
    calibration: Calibration
    device: str
    sensitivity_tokens: int = SENSITIVITY_TOKENS


def with_planner(action: Callable[[Planner], Any], model: str, folder: Path, options: PlannerOptions) -> Any:
    """What action(planner) returns, with a progress bar on stderr for every phase."""
    from ..formats.base import open_source
    from ..palette import outer_palette
    from ..palette import palette as schemes_of
    from ..planning import Planner
    from ..recipe import make_plan

    o = options
    template = make_plan(
        bits=4,
        effort=o.effort,
        head_bits=o.head_bits,
        embed_bits=o.embed_bits,
        keep=o.keep or (),
        set_=o.set_ or (),
        seed=o.calibration.seed,
    )
    chosen_outside = o.head_bits is None and o.embed_bits is None
    with phases() as step:
        planner = Planner(
            open_source(model),
            template,
            schemes_of(o.palette or (), o.effort),
            outer_palette(o.palette or (), o.effort) if chosen_outside else (),
            o.calibration,
            folder,
            serve=o.serve,
            device=o.device,
            sensitivity_tokens=o.sensitivity_tokens,
            effort=o.effort,
            progress=step,
        )
        return action(planner)


def planned(planner: Planner, budget: Budget, refine: int) -> StoredPlan:
    """Everything from statistics to a plan that tells what is predicted of it."""
    from ..formats.kv_plan_file import write_kv_plan
    from ..plan_refine import Refinement
    from ..plan_telling import stored_plan

    planner.check(budget)
    planner.measure()
    if budget.memory_bytes is not None:
        planner.cache = cache_of(planner)
        write_kv_plan(planner.folder, planner.cache)
    solved, rounds = Refinement(planner).refine(budget, refine)
    return stored_plan(planner, solved, budget, rounds, command_line())


def cache_of(planner: Planner) -> StoredKVPlan:
    """Sensitivities of the original model's cache, those that the folder has or new ones."""
    from ..calibrate.plan import PlanError
    from .plan_kv import measured_cache

    calib = planner.calibration.text
    if calib == "self":
        raise PlanError("--memory: the cache is planned on written text; give a file, or builtin (--calib)")
    config = planner.source.config
    positions = config.get("max_position_embeddings", config.get("n_positions")) or CACHE_LENGTHS[-1]
    lengths = sorted({min(length, int(positions)) for length in CACHE_LENGTHS})
    return measured_cache(
        planner.source,
        planner.folder,
        calib,
        tokens=CACHE_TOKENS,
        lengths=lengths,
        kl_tokens=CACHE_TOKENS // 4,
        sinks=None,
        window=CACHE_WINDOW,
        mixes=CACHE_MIXES,
        dtype=planner.compilation.dtype,
    )


def budget_of(
    bits: float | None,
    size_: str | None,
    memory: str | None,
    context: int | None,
    batch: int,
    tokens_per_second: float | None,
    threads: int | None,
) -> Budget:
    """The budget that options ask for. PlanError where they make none."""
    from ..plan_budget import Budget

    return Budget(
        bits=bits,
        size_bytes=None if size_ is None else sized("--size", size_),
        memory_bytes=None if memory is None else sized("--memory", memory),
        context=context,
        batch=batch,
        tokens_per_second=tokens_per_second,
        threads=threads,
    )


def check_place(out: Path) -> None:
    """FormatError where the file could not be written, before minutes are spent on it."""
    from ..formats.errors import FormatError

    if out.is_dir():
        raise FormatError(f"{out} is a folder; name a file for the plan")
    if not out.absolute().parent.is_dir():
        raise FormatError(f"{out.parent}: there is no such folder; make it first")


def command_line() -> str:
    """The command as it was typed, for files to keep."""
    return shlex.join(["quantize", *sys.argv[1:]])


def summary_of(stored: StoredPlan) -> dict[str, Any]:
    """What `--json` prints of a plan."""
    return {
        "bits_per_weight": stored.bits_per_weight,
        "predicted": stored.predicted.model_dump(),
        "bytes": stored.bytes.model_dump(),
        "solver": stored.solver.model_dump(),
        "rounds": [r.model_dump() for r in stored.rounds],
    }


def show(stored: StoredPlan, out: Path, seconds: float) -> None:
    """The plan in a table: bits by kind of weight, bytes by part, what is predicted."""
    from rich.console import Console
    from rich.table import Table

    from ..calibrate.weight_kinds import kinds_of
    from ..plan_amounts import CHUNK

    console = Console(soft_wrap=True, highlight=False)
    named, kinds = kinds_of(stored.weights), dict[str, list[Any]]()
    for name, weight in stored.weights.items():
        kinds.setdefault(named[name] if weight.part == "linear" else weight.part, []).append(weight)
    table = Table("weights", "number", "bits, mean", "least", "most", "bytes", "KL", box=None)
    for kind, found in kinds.items():
        bits = [w.bits for w in found]
        total, numbers = sum(w.bytes for w in found), sum(w.bytes * 8 / w.bits for w in found)
        kl = sum(w.predicted for w in found)
        mean = 8 * total / numbers
        table.add_row(
            kind, str(len(found)), f"{mean:.2f}", f"{min(bits):.2f}", f"{max(bits):.2f}", size(total), f"{kl:.4f}"
        )
    console.print(table)
    p = stored.predicted
    line = f"{stored.bits_per_weight:.3f} bits a weight, files {size(stored.bytes.file)}; KL {p.kl:.4f} ± {p.kl_se:.4f}"
    if p.perplexity is not None and p.reference_perplexity is not None:
        line += f", perplexity {p.perplexity:.2f} (original {p.reference_perplexity:.2f})"
    console.print(line + " predicted")
    if stored.cache is not None and stored.bytes.memory is not None:
        formats = ", ".join(f"{n} x {name}" for name, n in Counter(c.format for c in stored.cache.values()).items())
        console.print(
            f"cache: {formats}, {size(stored.bytes.cache)} for {stored.budget.batch} x {stored.budget.context} tokens; "
            f"memory {size(stored.bytes.memory)}, the prompt read {CHUNK} tokens at a time"
        )
    if stored.contexts:
        console.print("longest context in " + ", ".join(f"{m}: {n:,} tokens" for m, n in stored.contexts.items()))
    if p.tokens_per_second is not None:
        console.print(f"{p.tokens_per_second:.1f} tokens a second on this machine")
    for r in stored.rounds:
        console.print(
            f"true KL {r.measured:.4f} ± {r.measured_se:.4f} where {r.predicted:.4f} was predicted; planning again "
            f"bought {r.bought:.4f}"
        )
    s = stored.solver
    told = "none is cheaper" if s.exact else f"another could be cheaper by {s.gap:.2g} at most"
    console.print(f"solved in {s.seconds:.2f} s over {s.items} weights x {s.candidates} schemes: {told}")
    console.print(f"{out} in {duration(seconds)}; `quantize run MODEL OUT --plan {out}` runs it")


def draw_front(points: list[dict[str, Any]], path: Path) -> None:
    """The points of `pareto` as a PNG."""
    from matplotlib.figure import Figure

    from .picture import write_picture

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    xs = [p["bits"] for p in points]
    axes.plot(xs, [p["predicted"] for p in points], "o--", label="predicted")
    axes.errorbar(
        xs, [p["measured"] for p in points], yerr=[p["measured_se"] for p in points], fmt="s-", label="measured"
    )
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("KL divergence, nats a token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    write_picture(path, figure)
