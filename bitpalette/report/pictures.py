"""The pictures of the report: each a function of the data, the colours and the width, None where there is nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..calibrate.card import plus_minus
from ..commands.text import size
from .data import ReportData, WeightRow
from .histogram import REACH, bin_centers
from .theme import RAMP, Theme

WIDE, NARROW = 9.0, 4.0
"""Inches: of a desk's screen, and of a phone's. Text has the same size in both."""

PART_NAMES = {"linear": "layers", "head": "output head", "embedding": "embeddings", "other": "norms, the rest"}
_MARKERS = "os^Dv<>P*X"


@dataclass(frozen=True)
class Canvas:
    """What a picture is drawn in. width: inches."""

    theme: Theme
    width: float

    @property
    def wide(self) -> bool:
        return self.width > 6

    def figure(self, height: float) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width, height), layout="constrained")
        figure.patch.set_alpha(0)
        return figure

    def dress(self, axes: Any, grid: str = "y") -> None:
        """Axes in the theme's colours: two spines, a thin grid behind."""
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(self.theme.grid)
        axes.tick_params(which="both", colors=self.theme.muted, labelcolor=self.theme.muted, length=3)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(self.theme.muted)
        axes.title.set_color(self.theme.ink)
        if grid:
            axes.grid(axis=grid, color=self.theme.grid, linewidth=0.6)
            axes.set_axisbelow(True)

    def legend(self, figure: Any, axes: Any, columns: int) -> None:
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            legend = figure.legend(
                handles, labels, loc="outside lower center", ncols=columns if self.wide else min(columns, 3),
                frameon=False, columnspacing=1.2, handletextpad=0.4,
            )  # fmt: skip
            for text in legend.get_texts():
                text.set_color(self.theme.ink)


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """matplotlib's settings for all that is drawn and saved inside."""
    import matplotlib

    settings: Any = {
        "font.size": 9,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "text.color": theme.ink,
    }
    with matplotlib.rc_context(settings | {"axes.titlesize": 10, "axes.titlelocation": "left"}):
        yield


def bits_by_layer(data: ReportData, canvas: Canvas) -> Any:
    """A heat map: blocks by kinds of weight; wide, blocks go to the right, narrow, down."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Rectangle

    inside = [w for w in data.weights if w.block is not None]
    if not inside:
        return None
    kinds, blocks = _kinds(inside), sorted({w.block for w in inside if w.block is not None})
    low, high = min(w.bits for w in inside), max(w.bits for w in inside)
    if high - low < 0.25:  # a uniform checkpoint: differences of scales and padding are no plan
        middle = (low + high) / 2
        low, high = middle - 0.5, middle + 0.5
    across, down = (len(blocks), len(kinds)) if canvas.wide else (len(kinds), len(blocks))
    figure = canvas.figure(1.25 + 0.27 * down if canvas.wide else 1.7 + 0.14 * down)
    axes = figure.subplots()
    canvas.dress(axes, "")
    places, rows = {k: i for i, k in enumerate(kinds)}, {b: i for i, b in enumerate(blocks)}
    for w in inside:
        assert w.block is not None
        x, y = (rows[w.block], places[w.kind]) if canvas.wide else (places[w.kind], rows[w.block])
        step = min(RAMP - 1, int((w.bits - low) / (high - low) * RAMP))
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, color=canvas.theme.ramp[step], linewidth=0))
    every = max(1, math.ceil(len(blocks) / (16 if canvas.wide else 30)))
    of_blocks = ([i + 0.5 for i in range(0, len(blocks), every)], [str(b) for b in blocks[::every]])
    of_kinds = ([i + 0.5 for i in range(len(kinds))], kinds)
    axes.set(xlim=(0, across), ylim=(down, 0))
    axes.set_xticks(
        *(of_blocks if canvas.wide else of_kinds), **({} if canvas.wide else {"rotation": 45, "ha": "right"})
    )
    axes.set_yticks(*(of_kinds if canvas.wide else of_blocks))
    (axes.set_xlabel if canvas.wide else axes.set_ylabel)("block")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), ListedColormap(canvas.theme.ramp)), ax=axes,
        location="right" if canvas.wide else "top", label="bits a weight",
        fraction=0.03, pad=0.01 if canvas.wide else 0.02, aspect=14 if canvas.wide else 26,
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=canvas.theme.muted, length=2)
    for label in (bar.ax.xaxis.label, bar.ax.yaxis.label):
        label.set_color(canvas.theme.muted)
    return figure


def bytes_by_part(data: ReportData, canvas: Canvas) -> Any:
    parts = list(data.parts.items())
    figure = canvas.figure(0.75 + 0.38 * len(parts))
    axes = figure.subplots()
    canvas.dress(axes, "x")
    whole, most = sum(data.parts.values()), max(data.parts.values())
    names = [PART_NAMES[part] + (" and head" if data.tied and part == "embedding" else "") for part, _ in parts]
    axes.barh(names, [n / 1e6 for _, n in parts], color=canvas.theme.series[0], height=0.62)
    for i, (_, n) in enumerate(parts):
        axes.text(n / 1e6 + most / 1e6 * 0.012, i, f"{size(n)}, {n / whole:.1%}", va="center", color=canvas.theme.ink)
    axes.invert_yaxis()
    axes.set(xlabel="MB", xlim=(0, most / 1e6 * (1.2 if canvas.wide else 1.9)))
    return figure


def predicted_measured(data: ReportData, canvas: Canvas) -> Any:
    """KL and perplexity as points with error bars of one standard error."""
    plan = data.plan
    if plan is None:
        return None
    predicted, measured = plan.predicted, plan.measured
    kl = [("predicted", predicted.kl, predicted.kl_se, 0)]
    if measured is not None:
        kl.append(("measured", measured.kl, measured.kl_se, 1))
    perplexity = [
        ("original", predicted.reference_perplexity, None, 2),
        ("predicted", predicted.perplexity, None, 0),
        ("measured", measured.perplexity if measured else None, None, 1),
    ]
    known = [(name, value, error, colour) for name, value, error, colour in perplexity if value is not None]
    panels = [("KL divergence, nats a token", kl)] + ([("perplexity", known)] if known else [])
    side_by_side = canvas.wide and len(panels) > 1
    figure = canvas.figure(1.9 if side_by_side or len(panels) == 1 else 3.5)
    grid = figure.subplots(1 if side_by_side else len(panels), len(panels) if side_by_side else 1, squeeze=False)
    for axes, (title, points) in zip(grid.flat, panels, strict=True):
        canvas.dress(axes, "x")
        axes.set_title(title)
        for i, (_, value, error, colour) in enumerate(points):
            axes.errorbar(value, i, xerr=error, fmt="o", color=canvas.theme.series[colour], capsize=4, markersize=7)
            axes.annotate(
                plus_minus(value, error), (value, i), (0, 9), textcoords="offset points", ha="center",
                color=canvas.theme.ink,
            )  # fmt: skip
        spread = [v + s * (e or 0.0) for _, v, e, _ in points for s in (-1, 1)]
        room = max(max(spread) - min(spread), 0.02 * max(spread), 1e-9) * (0.35 if canvas.wide else 0.5)
        axes.set(xlim=(min(spread) - room, max(spread) + room), ylim=(len(points) - 0.5, -0.75))
        axes.set_yticks(range(len(points)), [name for name, *_ in points])
        axes.locator_params(axis="x", nbins=5 if canvas.wide else 4)
    return figure


def rounds(data: ReportData, canvas: Canvas) -> Any:
    """KL predicted and measured, round after round of refinement."""
    if data.plan is None or not data.plan.rounds:
        return None
    figure = canvas.figure(2.5)
    axes = figure.subplots()
    canvas.dress(axes)
    found = data.plan.rounds
    numbers = range(1, len(found) + 1)
    axes.plot(numbers, [r.predicted for r in found], "o-", color=canvas.theme.series[0], label="predicted")
    axes.errorbar(
        numbers, [r.measured for r in found], yerr=[r.measured_se or 0.0 for r in found], fmt="s-", capsize=4,
        color=canvas.theme.series[1], label="measured",
    )  # fmt: skip
    axes.set(xlabel="round", ylabel="KL, nats a token", xlim=(0.5, len(found) + 0.5))
    axes.set_xticks(list(numbers))
    canvas.legend(figure, axes, 2)
    return figure


def errors(data: ReportData, canvas: Canvas) -> Any:
    label = "relative squared error" + (" of the output" if data.calibrated else " of the weight")
    return _by_block(data, canvas, label, lambda w: (w.error, None))


def sensitivities(data: ReportData, canvas: Canvas) -> Any:
    return _by_block(data, canvas, "alpha, nats a token", lambda w: (w.alpha, w.alpha_se))


def kl_by_block(data: ReportData, canvas: Canvas) -> Any:
    """Predicted KL of every block, its kinds of weight stacked; what stands outside the blocks at the end."""
    known = [w for w in data.weights if w.predicted is not None]
    if not known:
        return None
    kinds, places, ticks = _kinds(known), *_places(known, canvas)
    figure = canvas.figure(2.9)
    axes = figure.subplots()
    canvas.dress(axes)
    base = dict.fromkeys(places.values(), 0.0)
    for number, kind in enumerate(kinds):
        heights = dict.fromkeys(base, 0.0)
        for w in known:
            if w.kind == kind:
                heights[places[_place(w)]] += w.predicted or 0.0
        x = list(heights)
        axes.bar(
            x, [heights[i] for i in x], bottom=[base[i] for i in x], width=0.8, label=kind,
            color=canvas.theme.series[number % len(canvas.theme.series)],
            edgecolor=canvas.theme.surface, linewidth=0.5,
        )  # fmt: skip
        base = {i: base[i] + heights[i] for i in base}
    axes.set(xlabel="block", ylabel="predicted KL, nats a token")
    axes.set_xticks(*ticks)
    canvas.legend(figure, axes, 8)
    return figure


def histograms(data: ReportData, canvas: Canvas) -> Any:
    """Densities on a log scale, before and after the transforms, with the Gaussian."""
    if not data.histograms:
        return None
    count = len(data.histograms)
    figure = canvas.figure(2.9 if canvas.wide else 2.3 * count + 0.4)
    grid = figure.subplots(1 if canvas.wide else count, count if canvas.wide else 1, squeeze=False, sharey=canvas.wide)
    centers = bin_centers()
    for number, (axes, found) in enumerate(zip(grid.flat, data.histograms, strict=True)):
        canvas.dress(axes)
        named = found.name.removesuffix(".weight").split(".")
        axes.set_title(".".join(named[-3:]) if len(named) > 3 else ".".join(named), fontsize=9)
        gaussian = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in centers]
        axes.plot(centers, gaussian, "--", color=canvas.theme.muted, linewidth=1.2, label="Gaussian")
        shapes = [("before", found.before, 1)]
        if found.after is not None:
            shapes.append((f"after {', '.join(found.transforms)}", found.after, 0))
        for label, shape, colour in shapes:
            drawn = [d if d > 0 else math.nan for d in shape.density]
            axes.step(centers, drawn, where="mid", color=canvas.theme.series[colour], linewidth=1.3, label=label)
        axes.set(yscale="log", xlim=(-REACH, REACH), ylim=(1e-7, 1.5))
        axes.set_xticks([-8, -4, 0, 4, 8])
        if number == 0 or not canvas.wide:
            axes.set_ylabel("density")
        if number == count - 1 or canvas.wide:
            axes.set_xlabel("standard deviations")
    canvas.legend(figure, grid.flat[0], 3)
    return figure


def pareto(data: ReportData, canvas: Canvas) -> Any:
    """KL against bits of the plans beside the checkpoint, with the checkpoint itself."""
    lines = [
        (label, [(p.bits, value) for p in data.pareto if (value := getattr(p, label)) is not None and value > 0])
        for label in ("predicted", "measured")
    ]
    if not any(points for _, points in lines):
        return None
    figure = canvas.figure(3.0)
    axes = figure.subplots()
    canvas.dress(axes)
    for (label, points), marker, colour in zip(lines, "os", canvas.theme.series, strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    here = data.plan.measured or data.plan.predicted if data.plan is not None else None
    if here is not None and here.kl > 0:
        axes.plot(
            [_linear_bits(data)], [here.kl], "*", markersize=13, color=canvas.theme.series[2], label="this checkpoint"
        )
    axes.set(xlabel="bits a weight", ylabel="KL, nats a token")
    _plain_log(axes)
    canvas.legend(figure, axes, 3)
    return figure


def _linear_bits(data: ReportData) -> float:
    """As the plan counts its budget: what it says itself, else the average here."""
    told = data.plan.bits_per_weight if data.plan is not None else None
    return data.bits if told is None else told


def _by_block(
    data: ReportData, canvas: Canvas, label: str, value: Callable[[WeightRow], tuple[float | None, float | None]]
) -> Any:
    """A line for each kind of weight over the blocks, on a log scale, with standard errors where there are some."""
    known = [w for w in data.weights if (value(w)[0] or 0.0) > 0]
    if not known:
        return None
    kinds, places, ticks = _kinds(known), *_places(known, canvas)
    figure = canvas.figure(3.3 if canvas.wide else 3.6)
    axes = figure.subplots()
    canvas.dress(axes)
    for number, kind in enumerate(kinds):
        members = [w for w in known if w.kind == kind]
        y = [value(w)[0] or math.nan for w in members]
        spread = [value(w)[1] or 0.0 for w in members]
        below = [min(s, 0.9 * v) for v, s in zip(y, spread, strict=True)]  # a log scale has no zero
        axes.errorbar(
            [places[_place(w)] for w in members], y, yerr=[below, spread] if any(spread) else None, label=kind,
            marker=_MARKERS[number % len(_MARKERS)], markersize=3.5, linewidth=1.1, elinewidth=0.8,
            color=canvas.theme.series[number % len(canvas.theme.series)],
        )  # fmt: skip
    axes.set(xlabel="block", ylabel=label)
    _plain_log(axes)
    axes.set_xticks(*ticks)
    canvas.legend(figure, axes, 8)
    return figure


def _plain_log(axes: Any) -> None:
    """A log scale whose ticks are plain numbers: 1, 2 and 5 of every decade, or over many decades 1 alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _kinds(weights: Sequence[WeightRow]) -> list[str]:
    """In the order of the model, those outside the blocks last."""
    ordered = sorted(weights, key=lambda w: w.block is None)
    return list(dict.fromkeys(w.kind for w in ordered))


def _place(w: WeightRow) -> int | str:
    return w.kind if w.block is None else w.block


def _places(
    weights: Sequence[WeightRow], canvas: Canvas
) -> tuple[dict[int | str, float], tuple[list[float], list[str]]]:
    """({block or kind outside the blocks: x}, (x of ticks, labels)); the outer ones stand apart, on the right."""
    blocks = sorted({w.block for w in weights if w.block is not None})
    outer = list(dict.fromkeys(w.kind for w in weights if w.block is None))
    apart = max(1.5, len(blocks) / 20)
    places: dict[int | str, float] = {b: float(i) for i, b in enumerate(blocks)}
    places |= {kind: len(blocks) - 1 + apart * (i + 1) for i, kind in enumerate(outer)}
    every = max(1, math.ceil(len(blocks) / (16 if canvas.wide else 7)))
    shown = blocks[::every]
    words = {kind: _short(kind) for kind in outer}
    where = [places[b] for b in shown] + [places[kind] for kind in outer]
    return places, (where, [*map(str, shown), *(words[k] for k in outer)])


def _short(kind: str) -> str:
    return "head" if "head" in kind else "emb." if "emb" in kind or kind == "wte" else kind[:6]


PICTURES: dict[str, Callable[[ReportData, Canvas], Any]] = {
    f.__name__: f
    for f in (
        bits_by_layer, bytes_by_part, predicted_measured, rounds, kl_by_block, sensitivities, errors, histograms,
        pareto,
    )
}  # fmt: skip
"""{name: function}; the names are those of the PNG files."""
