"""What rounding a weight will do to its layer's output, for every scheme that it could get, before anything is rounded.

The unit of an error is that of white noise in the weight: an error of t^2 is what noise of relative energy t^2 does,
so that alpha * error is a KL divergence (calibrate/sensitivity.py). For codes with feedback it is about rho * D(rate):
rho, the share of the error that feedback leaves, follows from the Hessian alone (`quant.ldlq.feedback_share`), and D is
the codec's squared error on N(0, 1). What that leaves out (rows that are not normal, Hessians that feedback meets in an
unlucky order) is measured: a sample of rows, drawn by their part in alpha, is quantized as it will be, a trellis at
ANCHORS alone, between which the ratio of measured to expected is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..quant.distortion import batches
from ..quant.ldlq import feedback_share
from ..quant.scheme import Scheme
from ..quant.solver import plan_solver, quantize_tensor
from ..quant.stats import Stats
from ..quant.transform import derive, get_transform
from ..quant.trellis import TrellisScheme

ROWS = 32
"""Rows of a sample: two rows of tiles."""

ANCHORS = (1.5, 2.5, 4.0)
"""Rates of the trellis that a sample is quantized at."""

ANCHOR_WINDOW = 12
"""Their window: the quickest search. The ratio to what is expected is taken to be that of wider windows."""

FEEDING_BACK = ("gptq", "ldlq")


@dataclass(frozen=True)
class Expected:
    """output: relative error of the layer's output in units of white noise, rows weighted by their part in alpha; its
    standard error. table: relative squared error of the rows themselves, what counts where they are looked up."""

    output: float
    standard_error: float
    table: float


def expected_errors(
    w: Tensor,
    solvers: Mapping[Scheme, str],
    stats: Stats | None,
    importance: Tensor | None,
    seed: int,
) -> dict[Scheme, Expected]:
    """w [out, in]; solvers: {scheme: solver that would round it}; stats: of its input, None where it has none, and only
    solvers without statistics are given; importance: [out], that of the rows (None: all alike), as in
    `Sensitivity.rows`; seed: of the rotation, and of the sample."""
    w = w.detach().float()
    rows, counts = sample_rows(w, importance, seed)
    found: dict[Scheme, Expected] = {}
    ladder = [s for s in solvers if isinstance(s, TrellisScheme)]
    for scheme, solver in solvers.items():
        if not isinstance(scheme, TrellisScheme):
            found[scheme] = _measured(w[rows], counts, scheme, solver, stats, seed)
    families: dict[tuple[tuple[str, ...], str], list[TrellisScheme]] = {}
    for scheme in ladder:
        families.setdefault((scheme.transforms, solvers[scheme]), []).append(scheme)
    for (_, solver), schemes in families.items():
        found |= _ladder(w[rows], counts, schemes, solver, stats, seed)
    return {scheme: found[scheme] for scheme in solvers}


def sample_rows(w: Tensor, importance: Tensor | None, seed: int, count: int = ROWS) -> tuple[Tensor, Tensor]:
    """(indices int64 [n <= count], how often each was drawn, float64 [n]): rows drawn by their part in alpha, evenly
    along their cumulated sum, so that a mean over the draws is a mean weighted by it."""
    share = w.double().square().sum(1)
    if importance is not None:
        share = share * importance.to(share)
    total = share.cumsum(0)
    if not float(total[-1]) > 0:
        total = torch.arange(1, len(w) + 1, dtype=torch.float64, device=w.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = float(torch.rand((), generator=generator, device="cpu"))
    points = (torch.arange(count, dtype=torch.float64, device=w.device) + start) * (total[-1] / count)
    index = torch.searchsorted(total, points).clamp(max=len(w) - 1)
    rows, counts = index.unique(return_counts=True)
    return rows, counts.double()


def _ladder(
    w: Tensor, counts: Tensor, schemes: Sequence[TrellisScheme], solver: str, stats: Stats | None, seed: int
) -> dict[Scheme, Expected]:
    """Schemes that differ in rate and window alone."""
    rates = [s.rate for s in schemes]
    low, high = min(rates), max(rates)
    anchors = sorted({min(max(rate, low), high) for rate in ANCHORS})
    share = _share(schemes[0], solver, stats, w.shape[1], seed)
    points = []
    for rate in anchors:
        scheme = schemes[0].replace(rate=rate, window=ANCHOR_WINDOW)
        expected, measured = share * gaussian_error(scheme), _measured(w, counts, scheme, solver, stats, seed)
        d = gaussian_error(scheme)
        points.append((rate, measured.output / expected, measured.standard_error / expected, measured.table / d))
    found: dict[Scheme, Expected] = {}
    for scheme in schemes:
        output, deviation, table = (
            _between(scheme.rate, [p[0] for p in points], [p[i] for p in points]) for i in (1, 2, 3)
        )
        d = gaussian_error(scheme)
        found[scheme] = Expected(output * share * d, deviation * share * d, table * d)
    return found


def _share(scheme: Scheme, solver: str, stats: Stats | None, in_features: int, seed: int) -> float:
    _, rounding = plan_solver(scheme, solver)
    if stats is None or rounding.name not in FEEDING_BACK:
        return 1.0
    if any(get_transform(name).by_weight for name in scheme.transforms):
        return 1.0
    _, after = derive(stats, scheme.transforms, in_features, seed, scheme)
    return feedback_share(after, scheme.block)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear in x and log y; constant outside."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    for a, b, ya, yb in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= b:
            part = (x - a) / (b - a)
            if ya <= 0 or yb <= 0:
                return (1 - part) * ya + part * yb
            return math.exp((1 - part) * math.log(ya) + part * math.log(yb))
    return ys[-1]


def _measured(w: Tensor, counts: Tensor, scheme: Scheme, solver: str, stats: Stats | None, seed: int) -> Expected:
    q = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=seed).dequantize()
    error = (q - w).double()
    energy = w.double().square().sum(1).clamp(min=1e-300)
    table = error.square().sum(1) / energy
    if stats is None:
        output = table
    else:
        hessian = stats.hessian.double()
        trace = float(hessian.diagonal().sum())
        mean = trace / len(hessian) if trace > 0 else 1.0
        output = ((error @ hessian) * error).sum(1) / (energy * mean)
    n = counts.sum()
    mean_output = (counts * output).sum() / n
    spread = (counts * (output - mean_output).square()).sum() / n
    return Expected(float(mean_output), math.sqrt(float(spread / n)), float((counts * table).sum() / n))


@lru_cache(maxsize=1024)
def gaussian_error(scheme: Scheme) -> float:
    """Mean squared error of the scheme's codes, rounded to nearest, on N(0, 1): two matrices [16, 4096]."""
    bare = scheme.replace(transforms=())
    if bare != scheme:
        return gaussian_error(bare)
    errors = [
        float((quantize_tensor(w, bare, solver="rtn").dequantize().double() - w.double()).square().mean())
        for w in batches(2, 0)
    ]
    return sum(errors) / len(errors)
