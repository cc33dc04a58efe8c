"""Squared error of every codec on N(0, 1), the source that rotated weights come close to, against Shannon's bound.

No code of R bits a weight has a mean squared error below 2^(-2R) there (Shannon, IRE Conv. Rec. 7, 1959), so the gap
in dB, 10 log10(mse * 2^(2R)), says how much a codec leaves, at whatever rate: 6.02 dB are one bit.

Weights are encoded as a layer's are, by `quantize_tensor`. They come in batches [16, 4096]: whole tiles, and rows as
long as a layer's, because one scale for a short row would follow the few weights that it serves. Each batch is brought
to a mean square of exactly 1; its deviation from that, 0.55 % a batch, would only be noise in the result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codec import codec_names, get_codec
from .scheme import Scheme, SchemeError
from .solver import quantize_tensor
from .tensor import field_specs, stored_bytes

BATCH = (16, 4096)
LEAST_WEIGHTS = 2 * BATCH[0] * BATCH[1]
"""Two batches: one alone has no spread."""

LAYER = (4096, 4096)
"""The weight whose stored bits are given: scales and tables counted. Its rows are as long as a batch's."""

WINDOW = 16
SIXTEENTHS = range(16, 81)
USUAL_SIXTEENTHS = (*range(16, 65, 4), 72, 80)

PUBLISHED = {1.5: 0.1403, 2: 0.0710, 2.25: 0.0537, 2.5: 0.0363, 3: 0.0189, 3.25: 0.0145, 3.5: 0.0102, 4: 0.0059}
"""{bits: mean squared error} that Q-Palette reports, for comparison; not measured here."""
PUBLISHED_NAME = "Q-Palette"
PUBLISHED_SOURCE = "arXiv 2509.20214"


@dataclass(frozen=True)
class Point:
    """One codec at one rate. series: what it is compared under, a line of the plot. usual: measured without asking."""

    series: str
    values: dict[str, Any]
    usual: bool = True

    @property
    def scheme(self) -> Scheme:
        return Scheme.from_dict(self.values)

    @property
    def codec(self) -> str:
        return str(self.values["codec"])

    @property
    def rate(self) -> float:
        """Bits of the codes alone, per weight of `LAYER`."""
        (codes,), dtype = field_specs(self.scheme, LAYER)["codes"]
        return 8 * codes * dtype.itemsize / math.prod(LAYER)

    @property
    def stored_bits(self) -> float:
        """Bits of all fields, per weight of `LAYER`."""
        return 8 * stored_bytes(self.scheme, LAYER) / math.prod(LAYER)


def _int_points(window: int) -> list[Point]:
    return [Point("int", {"codec": "int", "bits": bits, "group_size": 0}) for bits in range(1, 9)]


def _lut_points(window: int) -> list[Point]:
    common = {"codec": "lut", "group_size": 0}
    lloyd = [Point("lut lloyd", {**common, "table": "lloyd", "entries": 1 << bits}) for bits in range(2, 9)]
    nf4 = Point("lut nf4", {**common, "table": "nf4", "entries": 16})
    pairs = [Point("lut pairs", {**common, "dims": 2, "entries": entries}) for entries in (16, 64, 256)]
    return [*lloyd, nf4, *pairs]


def _trellis_points(window: int) -> list[Point]:
    return [
        Point(
            f"trellis, window {window}", {"codec": "trellis", "rate": m / 16, "window": window}, m in USUAL_SIXTEENTHS
        )
        for m in SIXTEENTHS
    ]


def _float_points(window: int) -> list[Point]:
    rows = [Point("float", {"codec": "float", "element": name}) for name in ("e2m1", "e2m3", "e4m3")]
    other = Point("float e3m2", {"codec": "float", "element": "e3m2"})
    blocks = {"codec": "float", "scale_format": "e8m0", "group_size": 32}
    mx = [Point("float mx", {**blocks, "element": name}) for name in ("e2m1", "e2m3", "e4m3")]
    nvfp4 = Point("float nvfp4", {"codec": "float", "scale_format": "e4m3", "group_size": 16})
    return [*rows, other, *mx, nvfp4]


POINTS: dict[str, Callable[[int], list[Point]]] = {
    "float": _float_points,
    "int": _int_points,
    "lut": _lut_points,
    "trellis": _trellis_points,
}
"""{codec: its points for a window of the trellis}. A codec that is not here is not measured, which a test forbids."""


def points_of(codec: str, window: int = WINDOW) -> list[Point]:
    """All points of a codec, in order of rate. SchemeError for a codec or a window that there is not."""
    get_codec(codec)
    if codec not in POINTS:
        raise SchemeError(f"codec {codec!r} has no points to measure; there are those of {list(POINTS)}")
    return sorted(POINTS[codec](window), key=lambda p: (p.series, p.rate))


def choose_points(
    codecs: Sequence[str] = (), rates: Sequence[float] | None = (), window: int | None = None
) -> list[Point]:
    """The points to measure.

    codecs: names; none means all. rates: bits of the codes; none means the usual ones, None means every one there is.
    window: of the trellis; None is `WINDOW`. Raises SchemeError where a codec or window does not exist, a rate is one
    that none of the codecs has, a codec has none of the rates, or a window is given to codecs without one.
    """
    names = list(dict.fromkeys(codecs)) or codec_names()
    candidates = [p for name in names for p in points_of(name, WINDOW if window is None else window)]
    if window is not None and not any("window" in p.values for p in candidates):
        raise SchemeError(f"window {window} is of the codec 'trellis'; measured are {names}")
    if rates is None:
        return candidates
    if not rates:
        return [p for p in candidates if p.usual]
    for rate in rates:
        if all(p.rate != rate for p in candidates):
            raise SchemeError(f"no point at {rate:g} bits in {names}; {_nearest(candidates, rate)}")
    chosen = [p for p in candidates if p.rate in rates]
    for name in dict.fromkeys(codecs):
        if all(p.codec != name for p in chosen):
            own = [p for p in candidates if p.codec == name]
            raise SchemeError(f"codec {name!r} has no point at {rates[0]:g} bits; {_nearest(own, rates[0])}")
    return chosen


def _nearest(points: Sequence[Point], rate: float) -> str:
    there = sorted({p.rate for p in points})
    below, above = [r for r in there if r < rate][-1:], [r for r in there if r > rate][:1]
    return f"nearest {' and '.join(f'{r:g}' for r in below + above)}, of {there[0]:g} to {there[-1]:g}"


def batch_count(weights: int) -> int:
    """Batches that hold at least `weights` numbers. SchemeError for fewer than two batches' worth."""
    if weights < LEAST_WEIGHTS:
        raise SchemeError(
            f"{weights} weights are too few for an interval: at least {LEAST_WEIGHTS}, two batches of {list(BATCH)}"
        )
    return -(-weights // math.prod(BATCH))


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """`count` matrices float32 `BATCH` of N(0, 1), each of mean square 1; the same for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(count):
        w = torch.randn(BATCH, generator=generator, dtype=torch.float64, device="cpu")
        yield (w / w.square().mean().sqrt()).float()


@dataclass(frozen=True)
class Distortion:
    """Measured at one point. mse: mean over the batches; ci95: half the width of its 95 % confidence interval."""

    point: Point
    mse: float
    ci95: float

    @property
    def bound(self) -> float:
        """2^(-2R), for the rate of the codes alone."""
        return shannon_bound(self.point.rate)

    @property
    def gap_db(self) -> float:
        return gap_db(self.mse, self.point.rate)


def shannon_bound(rate: float) -> float:
    """The least mean squared error of any code of `rate` bits a weight for N(0, 1)."""
    return 2.0 ** (-2 * rate)


def gap_db(mse: float, rate: float) -> float:
    """Decibels of `mse` above the bound."""
    return 10 * math.log10(mse / shannon_bound(rate))


def measure(
    points: Sequence[Point],
    weights: int,
    seed: int,
    quantile: Callable[[int], float],
    step: Callable[[Point], None] = lambda point: None,
) -> list[Distortion]:
    """Encode the same batches at every point.

    weights: how many numbers, rounded up to whole batches. quantile: that of 97.5 % for so many degrees of freedom,
    by which the standard error of the mean becomes the interval. step: called before each batch of each point. Points
    take turns batch by batch, so that after one round the time that is left is known.
    """
    errors: list[list[float]] = [[] for _ in points]
    schemes = [p.scheme for p in points]
    count = batch_count(weights)
    for w in batches(count, seed):
        for point, scheme, error in zip(points, schemes, errors, strict=True):
            step(point)
            decoded = quantize_tensor(w, scheme, solver="rtn").dequantize()
            error.append(float((decoded.double() - w.double()).square().mean()))
    factor = quantile(count - 1) / math.sqrt(count)
    return [
        Distortion(p, statistics.fmean(e), factor * statistics.stdev(e)) for p, e in zip(points, errors, strict=True)
    ]
