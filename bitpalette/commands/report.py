"""`quantize report`: a checkpoint's bits, errors and predictions as one page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..report.data import ReportData

HISTOGRAMS = 3


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The original, for histograms of weights.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write, .html.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder to put the pictures in, too, as PNG.")] = None,
    pareto: Annotated[
        Path | None, typer.Option(help="Points of `quantize pareto`.", show_default="CHECKPOINT/pareto.json")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """One self-contained HTML page about CHECKPOINT: bits by layer, errors, sensitivities, predicted and measured."""
    _check(out, png)
    from .. import __version__
    from ..formats.atomic import write_atomically
    from ..report.data import gather, what_is_missing
    from ..report.page import render, write_pngs

    data = gather(checkpoint, pareto)
    if against is not None:
        data = _with_histograms(data, checkpoint, against)
    data = replace(data, missing=what_is_missing(data, against is not None))
    page = render(data, __version__)
    write_atomically(out, page.encode())
    pictures: list[Path] = []
    if png is not None:
        png.mkdir(exist_ok=True)
        pictures = write_pngs(data, png)
    if json_output:
        print(json.dumps(_summary(data, out, pictures)))
        return
    print(f"{out}: {len(data.weights)} weights at {data.bits:.3f} bits; open it in a browser")
    for item in data.missing:
        print(f"  not on it: {item.what}; {item.command}")


def _check(out: Path, png: Path | None) -> None:
    """PlanError where something could not be written, or drawn."""
    from ..calibrate.plan import PlanError

    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise PlanError(f"--out writes a .html file; got {str(out)!r}")
    if not out.parent.is_dir():
        raise PlanError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    if png is not None and ((png.exists() and not png.is_dir()) or not png.parent.is_dir()):
        problem = "a file" if png.exists() else f"in {png.parent}, which does not exist"
        raise PlanError(f"--png {png}: {problem}; name a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlanError("quantize report needs matplotlib; pip install 'bitpalette[report]' brings it") from None


def _with_histograms(data: ReportData, checkpoint: Path, against: str) -> ReportData:
    """Of the weights that were hardest to code, of different kinds; rotated ones before others."""
    from ..calibrate.reproduction import REPORT
    from ..formats.config_json import read_json
    from ..report.histogram import histograms

    inside = [w for w in data.weights if w.block is not None] or list(data.weights)
    inside.sort(key=lambda w: ("+rotate" not in w.scheme, -(w.error or 0.0)))
    chosen = {w.kind: w.name for w in reversed(inside)}  # the first of each kind
    order = list(dict.fromkeys(w.kind for w in inside))[:HISTOGRAMS]
    path = checkpoint / REPORT
    model = read_json(path).get("job", {}).get("model") if path.exists() else None
    return replace(data, histograms=histograms(checkpoint, against, [chosen[kind] for kind in order], model))


def _summary(data: ReportData, out: Path, pictures: list[Path]) -> dict[str, object]:
    plan = data.plan
    return {
        "out": str(out),
        "pictures": [str(path) for path in pictures],
        "weights": len(data.weights),
        "bits_per_weight": round(data.bits, 6),
        "file_bits_per_weight": round(data.file_bits, 6),
        "file_bytes": data.file_bytes,
        "bytes": dict(data.parts),
        "predicted": None if plan is None or plan.predicted is None else plan.predicted.model_dump(),
        "measured": None if plan is None or plan.measured is None else plan.measured.model_dump(),
        "missing": [{"what": item.what, "command": item.command} for item in data.missing],
    }
