"""The report as one HTML page: styles and pictures inside it, no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibrate.card import KL_IN_WORDS, plus_minus
from ..commands.text import duration, size
from .data import ReportData
from .pictures import NARROW, PICTURES, WIDE, Canvas, drawing
from .theme import DARK, LIGHT, STAND_IN, css_variables, inline_svg, png

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Table:
    """rare: columns that a phone leaves out."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rare: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """SVG for a desk's screen and for a phone's."""

    wide: Any
    narrow: Any


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    picture: Picture | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    under: str


def render(data: ReportData, version: str) -> str:
    """HTML. version: of the bitpalette that writes it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters["breakable"] = lambda name: Markup(str(escape(name)).replace(".", ".<wbr>"))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        data=data,
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        tiles=_tiles(data),
        kl_in_words=KL_IN_WORDS,
        kl_here=_kl_here(data),
        sections=list(_sections(data)),
        facts=_facts(data, version),
        commands=[c for c in (data.plan.command if data.plan is not None else "", data.python) if c],
        planned=any(w.predicted is not None for w in data.weights),
        rows=[_row(w) for w in data.weights],
    )


def write_pngs(data: ReportData, folder: Path) -> list[Path]:
    """A PNG for every picture that there is data for, in light colours; their paths. FormatError: a full disk."""
    from ..formats.atomic import write_atomically

    written = []
    with drawing(LIGHT):
        for name, draw in PICTURES.items():
            figure = draw(data, Canvas(LIGHT, WIDE))
            if figure is not None:
                figure.patch.set(facecolor=LIGHT.surface, alpha=1)
                write_atomically(folder / f"{name}.png", png(figure))
                written.append(folder / f"{name}.png")
    return written


def _kl_here(data: ReportData) -> str:
    """What the KL divergence means: exp(-KL) is the geometric mean of q / p over tokens drawn from p."""
    plan = data.plan
    stated = None if plan is None else plan.measured or plan.predicted
    kl = 0.1 if stated is None else stated.kl
    lead = "At 0.1, for example," if stated is None else f"At {_kl(kl)}, as here,"
    return (
        f"{lead} tokens that the original would choose get {-math.expm1(-kl):.1%} less probability on average "
        "(geometric mean) than it gives them."
    )


def _kl(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.2e}"


def _picture(data: ReportData, name: str, label: str) -> Picture | None:
    from markupsafe import Markup

    shown = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        with drawing(STAND_IN):
            figure = PICTURES[name](data, Canvas(STAND_IN, width))
            if figure is None:
                return None
            # ours, and escaped by matplotlib: the only text of others in it are names of weights
            shown.append(Markup(inline_svg(figure, f"{name}-{kind}", label)))
    return Picture(*shown)


def _tiles(data: ReportData) -> Iterable[Tile]:
    linear = [w for w in data.weights if w.part == "linear"]
    bits = 8 * sum(w.bytes for w in linear) / max(1, sum(_count(w.shape) for w in linear))
    yield Tile("bits a weight", f"{data.bits:.2f}", f"{bits:.2f} in the layers, scales counted")
    original = "" if data.source_bytes is None else f"from {size(data.source_bytes)}, "
    yield Tile("weight files", size(data.file_bytes), f"{original}{data.file_bits:.2f} bits a weight over all")
    plan = data.plan
    if plan is None:
        return
    predicted, measured = plan.predicted, plan.measured
    error = (measured or predicted).kl_se
    spread = "" if error is None else f"± {_kl(error)}, "
    if measured is not None:
        off = f" ({predicted.kl / measured.kl - 1:+.0%})" if measured.kl > 0 else ""
        yield Tile("KL, measured", _kl(measured.kl), f"{spread}predicted {_kl(predicted.kl)}{off}")
    else:
        yield Tile("KL, predicted", _kl(predicted.kl), f"{spread}not measured yet")
    perplexity = measured.perplexity if measured is not None else predicted.perplexity
    if perplexity is not None:
        reference = predicted.reference_perplexity
        under = "" if reference is None else f"original {reference:.2f}"
        yield Tile("perplexity" + ("" if measured else ", predicted"), f"{perplexity:.2f}", under)
    if measured is not None and measured.top1 is not None:
        yield Tile("same next token", f"{measured.top1:.1%}", "most likely token equals the original's")


def _sections(data: ReportData) -> Iterable[Section]:
    """Those that there is data for, in reading order."""
    builders: tuple[Callable[[ReportData], Section | None], ...] = (
        _predicted, _rounds, _bits, _bytes, _cost, _sensitivities, _errors, _histograms, _pareto,
    )  # fmt: skip
    yield from (section for build in builders if (section := build(data)) is not None)


def _predicted(data: ReportData) -> Section | None:
    picture = _picture(data, "predicted_measured", "predicted and measured KL divergence and perplexity")
    if picture is None or data.plan is None:
        return None
    measured = data.plan.measured
    where = ""
    if measured is not None:
        where = f" Measured on {measured.text_name or 'a text'}" + (
            "." if measured.tokens is None else f", {measured.tokens:,} tokens."
        )
    return Section(
        "Predicted and measured",
        "What the plan promised before anything was written, beside what was measured. Bars are one standard error."
        + where,
        picture,
    )


def _rounds(data: ReportData) -> Section | None:
    picture = _picture(data, "rounds", "predicted and measured KL divergence by round")
    if picture is None or data.plan is None:
        return None
    rows = tuple(
        (
            str(i),
            _kl(r.predicted),
            plus_minus(r.measured, r.measured_se),
            "" if r.bought is None else f"{r.bought:.4f}",
        )
        for i, r in enumerate(data.plan.rounds, 1)
    )
    return Section(
        "Rounds of refinement",
        "Plans were measured while planning, the predictor was corrected by what came out, and the plan solved again. "
        "Bought is by how much that lowered the KL divergence.",
        picture,
        Table(("round", "predicted", "measured", "bought"), rows),
    )


def _bits(data: ReportData) -> Section | None:
    picture = _picture(data, "bits_by_layer", "bits a weight of every layer")
    if picture is None:
        return None
    inside = [w.bits for w in data.weights if w.block is not None]
    outside = [f"{w.kind} {w.bits:.2f}" for w in data.weights if w.block is None]
    text = f"Every square is one weight matrix; {min(inside):.2f} to {max(inside):.2f} bits, scales counted."
    return Section("Bits by layer", text + (f" Outside the blocks: {', '.join(outside)}." if outside else ""), picture)


def _bytes(data: ReportData) -> Section:
    return Section("Bytes by part", "What the weight files hold.", _picture(data, "bytes_by_part", "bytes by part"))


def _cost(data: ReportData) -> Section | None:
    worst = data.worst()
    if not worst:
        return None
    picture = _picture(data, "kl_by_block", "predicted KL divergence by block")
    if picture is None:
        errors = tuple((_short(w.name), f"{w.bits:.2f}", _small(w.error)) for w, _ in worst)
        text = "The ten weights with the largest error; without a plan it is not known what their errors cost."
        return Section("The worst weights", text, None, Table(("weight", "bits", "error"), errors))
    rows = tuple(
        (_short(w.name), f"{w.bits:.2f}", _small(w.error), _small(w.predicted), f"{share:.1%}") for w, share in worst
    )
    return Section(
        "Where the cost comes from",
        "The predicted KL divergence, split over the weights, whose costs add up. The table has the ten costliest.",
        picture,
        Table(("weight", "bits", "error", "predicted KL", "share"), rows, rare=(2,)),
    )


def _short(name: str) -> str:
    """What all names of a model begin and end with says nothing."""
    return name.removesuffix(".weight").removeprefix("model.").removeprefix("transformer.")


def _sensitivities(data: ReportData) -> Section | None:
    picture = _picture(data, "sensitivities", "sensitivity of every weight")
    text = (
        "Alpha is the KL divergence that noise as large as the weight itself would cost: noise with a hundredth of its "
        "energy costs a hundredth. Bars are one standard error. Sensitive weights are worth more bits."
    )
    return None if picture is None else Section("Sensitivities", text, picture)


def _errors(data: ReportData) -> Section | None:
    picture = _picture(data, "errors", "error of every weight")
    what = (
        "of each layer's output on the calibration text"
        if data.calibrated
        else "of each weight: nothing was calibrated, so that outputs are not known"
    )
    return (
        None if picture is None else Section("Errors", f"Relative squared error {what}; 0.01 is one percent.", picture)
    )


def _histograms(data: ReportData) -> Section | None:
    picture = _picture(data, "histograms", "histograms of weights before and after rotation")
    if picture is None:
        return None
    rows = tuple(
        (
            _short(h.name),
            f"{h.before.kurtosis:.2f}",
            "" if h.after is None else f"{h.after.kurtosis:.2f}",
            f"{h.before.largest:.1f}",
            "" if h.after is None else f"{h.after.largest:.1f}",
        )
        for h in data.histograms
    )
    return Section(
        "Weights before and after rotation",
        "Codes are made for Gaussian values. A random rotation spreads large values over all columns, and brings a "
        "weight close to that. The kurtosis of a Gaussian is 3. The largest value is "
        "in standard deviations; what lies beyond 8 is drawn at 8.",
        picture,
        Table(("weight", "kurtosis", "rotated", "largest", "rotated"), rows),
    )


def _pareto(data: ReportData) -> Section | None:
    picture = _picture(data, "pareto", "KL divergence against bits a weight")
    if picture is None:
        return None
    rows = tuple(
        (
            f"{p.bits:.2f}",
            "" if p.bytes is None else size(p.bytes),
            _kl(p.predicted),
            _kl(p.measured),
        )
        for p in data.pareto
    )
    return Section(
        "Quality against size",
        "The best plans for other budgets, from the same calibration.",
        picture,
        Table(("bits", "size", "predicted KL", "measured KL"), rows),
    )


def _facts(data: ReportData, version: str) -> list[tuple[str, str]]:
    plan = data.plan
    facts = [("method", data.method), ("calibration", data.calibration)]
    if plan is not None:
        budget = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in plan.budget.model_dump().items() if v is not None)
        facts.append(("budget", budget or "none"))
        facts.append(("solver of the plan", _solved(plan.solver)))
        if plan.contexts:
            room = ", ".join(f"{memory}: {tokens:,} tokens" for memory, tokens in plan.contexts.items())
            facts.append(("context that fits in memory", room))
        if plan.predicted.seconds is not None:
            facts.append(("expected time of the run", duration(plan.predicted.seconds)))
        if plan.predicted.tokens_per_second is not None:
            facts.append(("expected speed", f"{plan.predicted.tokens_per_second:.1f} tokens a second"))
    facts.append(("versions", f"written by bitpalette {data.written_by or 'unknown'}, page by {version}"))
    return facts


def _solved(solver: Any) -> str:
    parts = [
        "" if solver.items is None else f"{solver.items} weights",
        "" if solver.candidates is None else f"{solver.candidates} schemes to choose from",
        "" if solver.seconds is None else duration(solver.seconds),
        "the best plan there is"
        if solver.exact
        else ""
        if solver.gap is None
        else f"at most {solver.gap:.2g} from the best",
    ]
    return ", ".join(part for part in parts if part) or "not recorded"


def _row(w: Any) -> dict[str, str]:
    return {
        "name": w.name,
        "shape": " × ".join(map(str, w.shape)),
        "scheme": w.scheme,
        "bits": f"{w.bits:.3f}",
        "bytes": f"{w.bytes:,}",
        "error": _small(w.error),
        "alpha": "" if w.alpha is None else plus_minus(w.alpha, w.alpha_se),
        "predicted": _small(w.predicted),
    }


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n
