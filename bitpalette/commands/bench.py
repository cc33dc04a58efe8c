"""`quantize bench`: measurements that need no model. `distortion`: every codec on N(0, 1) against Shannon's bound;
`kernels` is in bench_kernels.py."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_kernels import kernels
from .picture import check_plot, write_picture

if TYPE_CHECKING:
    from ..quant.distortion import Distortion, Point

WEIGHTS = 1 << 20


def register(app: typer.Typer) -> None:
    bench = typer.Typer(no_args_is_help=True, help="Measurements that need no model.")
    bench.command("distortion")(distortion)
    bench.command("kernels")(kernels)
    app.add_typer(bench, name="bench")


def distortion(
    codec: Annotated[list[str] | None, typer.Option(help="Codec to measure.", show_default="all")] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="Bits a weight, or all: sixteenths as well.", show_default="quarters and whole bits"),
    ] = None,
    weights: Annotated[int, typer.Option(help="Numbers to encode at each point.")] = WEIGHTS,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    window: Annotated[int | None, typer.Option(help="Of the trellis: 16, 14 or 12 bits.", show_default="16")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to encode with.", show_default="torch's")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Mean squared error of every codec at every rate on N(0, 1), and its gap to the bound 2^(-2R)."""
    from ..calibrate.plan import PlanError
    from ..quant.distortion import batch_count, choose_points, measure
    from ..quant.native import NativeError

    if threads is not None and threads < 1:
        raise PlanError(f"--threads is at least 1; got {threads}")
    if not 0 <= seed < 1 << 63:
        raise PlanError(f"--seed is 0 to 2**63 - 1; got {seed}")
    check_plot(plot)
    points = choose_points(codec or (), _rates(rate), window)
    count = batch_count(weights)
    quantile, interval = _quantile()
    try:
        with _threads(threads):
            about = _about(count, seed, interval)
            with _progress(len(points) * count) as step:
                rows = measure(points, weights, seed, quantile, step)
    except NativeError as error:
        raise PlanError(str(error)) from None
    if json_output:
        print(json.dumps({"about": about, "rows": [_row(r) for r in rows], "published": _published(rows)}))
    else:
        _print_table(rows, about)
    if plot is not None:  # last: a full disk does not take the figures with it
        write_plot(plot, rows)


def _rates(given: list[str] | None) -> list[float] | None:
    """As `choose_points` takes them: [] for the usual ones, None for all."""
    from ..calibrate.plan import PlanError

    if given == ["all"]:
        return None
    text = " ".join(given or ())
    try:
        rates = [float(r) for r in given or ()]
    except ValueError:
        rates = [math.nan]
    if not all(map(math.isfinite, rates)):
        raise PlanError(f"--rate is a number of bits, such as 2.25, or all alone; got {text}")
    return rates


def _quantile() -> tuple[Any, str]:
    """(97.5 % quantile by degrees of freedom, what the interval is called): Student's t where scipy is installed."""
    try:
        from scipy.stats import t
    except ImportError:
        return (lambda degrees: 1.959964), "normal (scipy is not installed)"
    return (lambda degrees: float(t.ppf(0.975, degrees))), "Student t"


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """torch's threads, which the encoders use, set to n for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """step(point) for each of `total` steps, as a bar on stderr with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        done = -1

        def step(point: Point) -> None:
            nonlocal done
            done += 1
            progress.update(task, completed=done, description=f"{point.codec} {_label(point)}")

        yield step


def _about(count: int, seed: int, interval: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from .. import __version__
    from ..provenance import commit, processor
    from ..quant.distortion import BATCH, LAYER
    from ..quant.native import chosen_isa, isa_index, why_no_cpu_module

    isa = None
    if why_no_cpu_module() is None:
        isa = chosen_isa()
        isa_index(isa)  # refuses one that is forced and not there
    return {
        "device": processor(),
        "isa": isa,
        "threads": torch.get_num_threads(),
        "weights": count * BATCH[0] * BATCH[1],
        "batches": count,
        "batch_shape": list(BATCH),
        "stored_bits_shape": list(LAYER),
        "seed": seed,
        "solver": "rtn",
        "interval": interval,
        "bitpalette": __version__,
        "commit": commit(),
    }


def _label(point: Point) -> str:
    return " ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in point.values.items() if k != "codec"
    )


def _row(result: Distortion) -> dict[str, Any]:
    point = result.point
    return {
        "codec": point.codec,
        "scheme": point.values,
        "rate": point.rate,
        "stored_bits": round(point.stored_bits, 6),
        "mse": result.mse,
        "ci95": result.ci95,
        "bound": result.bound,
        "gap_db": round(result.gap_db, 4),
    }


def _published(rows: Sequence[Distortion]) -> list[dict[str, Any]]:
    """Figures of others, at the rates that were measured here."""
    from ..quant.distortion import PUBLISHED, PUBLISHED_NAME, PUBLISHED_SOURCE, gap_db, shannon_bound

    measured = {r.point.rate for r in rows}
    return [
        {
            "codec": PUBLISHED_NAME,
            "source": PUBLISHED_SOURCE,
            "measured": False,
            "rate": rate,
            "mse": mse,
            "bound": shannon_bound(rate),
            "gap_db": round(gap_db(mse, rate), 4),
        }
        for rate, mse in PUBLISHED.items()
        if rate in measured
    ]


def _print_table(rows: Sequence[Distortion], about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=None)
    for column in ("codec", "scheme", "bits", "stored bits", "mse", "± 95 %", "2^(-2R)", "gap dB"):
        table.add_column(column, justify="left" if column in ("codec", "scheme") else "right", overflow="fold")
    series = None
    for r in rows:
        if series not in (None, r.point.series):
            table.add_section()
        series = r.point.series
        figures = (f"{r.point.rate:g}", f"{r.point.stored_bits:.4f}", _figure(r.mse), f"{r.ci95:.1e}")
        table.add_row(r.point.codec, _label(r.point), *figures, _figure(r.bound), f"{r.gap_db:.3f}")
    for p in _published(rows):
        name = f"published, {p['source']}; not measured here"
        gap = f"{p['gap_db']:.3f}"
        table.add_row(p["codec"], name, f"{p['rate']:g}", "", str(p["mse"]), "", _figure(p["bound"]), gap)
    console.print(table)
    shape = " x ".join(map(str, about["stored_bits_shape"]))
    console.print(
        f"{about['weights']:,} weights in {about['batches']} batches, seed {about['seed']}, interval: "
        f"{about['interval']}; stored bits of a weight of {shape}; {about['device']}, "
        f"{about['isa'] or 'no native code'}, threads: {about['threads']}, commit {about['commit'] or 'unknown'}",
    )


def _figure(mse: float) -> str:
    """Four digits, fixed point where that has few zeros."""
    return f"{mse:#.4g}" if mse >= 1e-4 else f"{mse:.3e}"


def write_plot(path: Path, rows: Sequence[Distortion]) -> None:
    """Gap in dB over the rate, one line a series with its interval, the published figures as crosses; complete or
    absent. FormatError where the system refuses to write."""
    from matplotlib.figure import Figure

    from ..quant.distortion import PUBLISHED_NAME, PUBLISHED_SOURCE

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    for series in dict.fromkeys(r.point.series for r in rows):
        line = [r for r in rows if r.point.series == series]
        margins = [10 / math.log(10) * r.ci95 / r.mse for r in line]  # to first order
        axes.errorbar(
            [r.point.rate for r in line], [r.gap_db for r in line], yerr=margins, marker=".", capsize=2, label=series
        )
    if published := _published(rows):
        rates, gaps = [p["rate"] for p in published], [p["gap_db"] for p in published]
        axes.plot(rates, gaps, "kx", label=f"{PUBLISHED_NAME} as published ({PUBLISHED_SOURCE}), not measured")
    axes.axhline(0, color="grey", linewidth=1, linestyle="--", label="Shannon bound, $2^{-2R}$")
    axes.set(xlabel="bits a weight, codes alone", ylabel="mean squared error on N(0, 1), dB over the bound")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    write_picture(path, figure)
