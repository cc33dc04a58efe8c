"""Transform `scale`: one factor an input column, T x = x / s; the search of AWQ (Lin et al., arXiv 2306.00978).

A column whose input is large is stored with a larger weight, hence with a smaller relative rounding error.

    input_scale  float16 [in]   s, positive
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .codec import get_codec
from .scheme import Scheme, SchemeError
from .stats import Stats
from .transform import get_transform

Rounding = Callable[[Tensor, Tensor], Tensor]
"""(scaled weight [rows, in], mean square of the scaled input [in]) -> rounded values [rows, in], in the same basis."""

EXPONENTS = 20
"""Steps of the exponent from 0 (no scaling) to 1 (as large as the mean input)."""

_REACH = 2.0**12
"""s stays in 1/_REACH .. _REACH: precise in fp16, and so is a weight times s."""

_SAMPLE = 1 << 18
"""Weights rounded for each exponent: some rows, evenly spaced, tell the exponents apart as well as all do."""


def search_scale(
    weights: Tensor | Sequence[Tensor], stats: Stats, quantize: Rounding, steps: int = EXPONENTS
) -> Tensor:
    """The input scale s = absmean^a, float16 [in], of least output error sum tr((Q - W) H (Q - W)^T) over a in 0..1.

    weights: [out, in], or several that see the same input (q, k, v) and share the scale. quantize: see
    `rounding_of`; it is given up to 256 rows of each weight. s is normalised so that sqrt(max * min) = 1; a column
    whose input is always 0 gets 1. a = 0 (no scaling) is among the candidates.
    """
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    sampled = [_sample_rows(w.float()) for w in weights]
    absmean = stats.absmean.float()
    live = (absmean > 0) & absmean.isfinite()
    if not bool(live.any()):
        return torch.ones_like(absmean, dtype=torch.float16)
    log = absmean.clamp(min=torch.finfo(torch.float32).tiny).log()
    low, high = log[live].min(), log[live].max()
    log = torch.where(live, log - (low + high) / 2, 0.0)  # sqrt(max * min) = 1
    energy = stats.hessian.diagonal().float()
    best_error, best = torch.inf, torch.ones_like(absmean, dtype=torch.float16)
    for step in range(steps + 1):
        half = (log * (step / steps)).exp().clamp(1 / _REACH, _REACH).to(torch.float16)
        s = half.float()
        error = 0.0
        for w, share in sampled:
            d = quantize(w * s, energy / s.square()) / s - w
            error += share * float(((d @ stats.hessian) * d).sum())
        if error < best_error:
            best_error, best = error, half
    return best


def _sample_rows(w: Tensor) -> tuple[Tensor, float]:
    """(some rows of w [out, in], evenly spaced; rows of w for each row of the sample)."""
    rows = min(w.shape[0], max(64, min(256, _SAMPLE // w.shape[1])))
    index = torch.arange(rows, device=w.device) * w.shape[0] // rows
    return w[index], w.shape[0] / rows


def rounding_of(scheme: Scheme, seed: int = 0) -> Rounding:
    """Round to nearest as `scheme` will do it: its codec, and those of its transforms that come after `scale`."""
    names = scheme.transforms
    after = [get_transform(name) for name in names[names.index("scale") + 1 :]] if "scale" in names else []
    codec = get_codec(scheme.codec)

    def quantize(w: Tensor, energy: Tensor) -> Tensor:
        chosen = []
        for transform in after:
            chosen.append(transform.choose(w, None, seed, scheme))
            w = transform.apply_weight(w, chosen[-1])
        grid = codec.grid(scheme, (w.shape[0], w.shape[1]), w.device)
        grid.fit(w, None if after else energy)  # a rotation leaves about the same energy in every column
        values = grid.nearest(w, torch.arange(w.shape[1], device=w.device))[1]
        for transform, fields in zip(reversed(after), reversed(chosen), strict=True):
            values = transform.undo_weight(values, fields)
        return values

    return quantize


class Scale:
    name = "scale"
    by_weight = True

    def fields(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"input_scale": ((shape[1],), torch.float16)}

    def choose(self, w: Tensor, stats: Stats | None, seed: int, scheme: Scheme) -> dict[str, Tensor]:
        if stats is None:
            raise SchemeError('the transform "scale" is chosen from calibration statistics, and there are none')
        return {"input_scale": search_scale(w, stats, rounding_of(scheme, seed))}

    def apply_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return w.float() * fields["input_scale"].float()

    def undo_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return w.float() / fields["input_scale"].float()

    def apply_input(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return (x.float() / fields["input_scale"].float()).to(x.dtype)

    def apply_stats(self, stats: Stats, fields: Mapping[str, Tensor]) -> Stats:
        s = fields["input_scale"].float()
        return Stats(stats.hessian / torch.outer(s, s), stats.absmean / s, stats.tokens)


TRANSFORM = Scale()
