"""The scale (and zero point) with the least squared error for a set of levels: the clipping search of every grid.

A group of weights w is coded as level(w / scale, zero) * scale. Clipping a few large weights makes all others finer,
so the best scale is below the one that covers all of them. The error has many shallow local minima in the scale, so:
try a ladder of scales, then finer steps around the best, then the least-squares scale for the codes as they stand
(the update of Lloyd's iteration, which no ladder needs to be fine enough for).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .scheme import SchemeError

Level = Callable[[Tensor, Tensor], Tensor]
"""level(u [..., n], zero [..., 1]) -> the level nearest to u, relative to the zero point; overwriting u is allowed."""

LADDER = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75, 0.7, 0.64, 0.57, 0.5, 0.43, 0.36, 0.29, 0.22, 0.15)
"""Fractions of the scale that covers every weight: fine at the top, where 6 to 8 bits have their best, and down to
.15, for one-bit levels and for rows with outliers."""

AsStored = Callable[[Tensor], Tensor]
"""Scales float32, rounded to those that the codec stores."""

FINER = (0.965, 0.9825, 1.0175, 1.035)
LEAST_SQUARES_STEPS = 2
IMPORTANCE_FLOOR = 1e-4
"""Of the mean importance: a column that calibration never saw still counts a little."""

_CHUNK = 1 << 17
"""Weights searched at a time on a CPU: 512 KiB stay in the cache over all candidates, and a step is long enough for
threads to be worth their start."""

_DEVICE_CHUNK = 1 << 26
"""Elsewhere: all of most layers at once, and of a table of 10^9 embeddings temporaries of 256 MiB."""


def fp16_scale(scale: Tensor) -> Tensor:
    """float32 values rounded to those of fp16."""
    return scale.to(torch.float16).float()


def least_error_scale(
    w: Tensor,
    level: Level,
    starts: Sequence[tuple[Tensor, Tensor]],
    importance: Tensor | None = None,
    *,
    zero_top: int = 0,
    ladder: Sequence[float] = LADDER,
    as_stored: AsStored = fp16_scale,
) -> tuple[Tensor, Tensor]:
    """(scale, zero) float32 [rows, groups] with the least error of w float32 [rows, groups, n] in stored scales.

    starts: (scale, zero) pairs [rows, groups], each scale covering every weight; the ladder goes down from each.
    importance: [groups, n], weighs the squares. zero_top: above 0 the zero point is searched too, in 0..zero_top.
    as_stored: rounds scales as they will be stored. Raises SchemeError where a covering scale is beyond fp16.
    """
    largest = max(float(scale.abs().max()) for scale, _ in starts)
    if not largest <= 65504:
        raise SchemeError(
            f"weights up to {float(w.abs().max()):.3g} need a scale of {largest:.3g}, beyond fp16's 65504: "
            "keep this weight, or scale it down"
        )
    if importance is not None:
        importance = relative_importance(importance)
    rows = chunk_rows(w)
    out = [
        _search(_Best(chunk, level, importance, as_stored), [(s[i], z[i]) for s, z in starts], zero_top, ladder)
        for chunk, i in zip(w.split(rows), torch.arange(w.shape[0], device=w.device).split(rows), strict=True)
    ]
    return torch.cat([scale for scale, _ in out]), torch.cat([zero for _, zero in out])


def relative_importance(importance: Tensor) -> Tensor:
    """importance [..., n] over its mean, within bounds in which squared errors stay finite."""
    mean = importance.mean(-1, keepdim=True)
    relative = importance / mean.clamp(min=torch.finfo(torch.float32).tiny)
    return relative.clamp(min=IMPORTANCE_FLOOR, max=1e6)


def chunk_rows(w: Tensor) -> int:
    """Rows of w [rows, groups, n] that are searched at a time."""
    return max(1, (_CHUNK if w.device.type == "cpu" else _DEVICE_CHUNK) // (w.shape[1] * w.shape[2]))


def _search(
    best: _Best, starts: Sequence[tuple[Tensor, Tensor]], zero_top: int, ladder: Sequence[float]
) -> tuple[Tensor, Tensor]:
    for scale, zero in starts:
        for factor in ladder:
            best.offer(scale * factor, zero)
    centre, zero = best.scale, best.zero
    for factor in FINER:
        best.offer(centre * factor, zero)
    for _ in range(LEAST_SQUARES_STEPS):
        best.offer(best.least_squares(best.zero), best.zero)
        if zero_top:
            for step in (-1, 1):
                zero = (best.zero + step).clamp(0, zero_top)
                best.offer(best.least_squares(zero), zero)
    return best.scale, best.zero


class _Best:
    """The best (scale, zero) offered so far for each group."""

    def __init__(self, w: Tensor, level: Level, importance: Tensor | None, as_stored: AsStored) -> None:
        self.w, self.level, self.importance, self.as_stored = w, level, importance, as_stored
        self.weighted = w if importance is None else w * importance
        self.error = w.new_full(w.shape[:-1], torch.inf)
        self.scale, self.zero = torch.zeros_like(self.error), torch.zeros_like(self.error)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale = self.as_stored(scale)
        squares = self._levels(scale, zero).mul_(scale[..., None]).sub_(self.w).square_()
        if self.importance is not None:
            squares.mul_(self.importance)
        error = squares.sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def least_squares(self, zero: Tensor) -> Tensor:
        """The best scale for the codes that the present scale gives with this zero point."""
        levels = self._levels(self.scale, zero)
        along = (self.weighted * levels).sum(-1)
        power = (levels.square_() if self.importance is None else levels.square_().mul_(self.importance)).sum(-1)
        return torch.where(power > 0, along / power, self.scale)

    def _levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        inverse = torch.where(scale == 0, scale, 1 / scale)
        return self.level(self.w * inverse[..., None], zero[..., None])
