"""Progressive scales of codec `int` at 4 bits: whole numbers for the groups under one fp16 for the row.

A weight is scale[row] * level, level = (code - zero_point) * group_scale a small integer: a product of int8 by int8
sums levels over all groups of a row before the fp16 scale is applied once. A kernel makes four levels at a time from
codes in the bytes of a word, q * group_scale + (128 - zero_point * group_scale) in each byte, then XOR 0x80. That is
right where no byte carries into the next. Every one of the 16 codes having a level in -119..119, the bytes are within
9..247 whatever the codes are (the bound is that of QServe, arXiv 2405.04532).

Against fp16 scales the squared error on N(0, 1) in groups of 64 is 4 % more with zero points; without them 15 %, of
which 12 are the sign that a whole number does not have: groups cannot turn their longer side to the larger weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .clipping import chunk_rows, fp16_scale, relative_importance
from .int import IntGrid, IntScheme
from .scheme import SchemeError

LARGEST_LEVEL = 119
TOP = 15
"""The highest code."""

FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 1.06, 1.12)
"""Of the row scale with which the largest group takes the largest whole number, tried before least squares."""

LEAST_SQUARES_STEPS = 2


def largest_group_scale(zero: Tensor) -> Tensor:
    """The largest whole number that keeps all 16 levels within -119..119, by zero point 0..15: 7 at 0, 14 at 8."""
    return torch.div(LARGEST_LEVEL, torch.maximum(zero, TOP - zero), rounding_mode="floor")


def check_group_scales(group_scale: Tensor, zero: Tensor) -> None:
    """SchemeError where a group scale, uint8, is 0 or too large for its zero point [same shape], uint8."""
    wrong = (group_scale < 1) | (group_scale > largest_group_scale(zero.int()))
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        scale, point = int(group_scale[at]), int(zero[at])
        largest = int(largest_group_scale(zero[at].int()))
        raise SchemeError(
            f"group_scale {scale} of row {at[0]}, group {at[1]} does not fit the zero point {point}: it is 1 to "
            f"{largest} there, so that levels stay within -{LARGEST_LEVEL} to "
            f"{LARGEST_LEVEL}; quantize the weight again"
        )


class ProgressiveGrid(IntGrid):
    """`scale` of the base class is row_scale [out, 1] * group_scale [out, groups]; nearest codes are inherited."""

    def __init__(self, scheme: IntScheme, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(scheme, shape, device)
        self.row_scale, self.group_scale = self.scale[:, :1].clone(), torch.ones_like(self.scale)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        """Groups as if their scales were free; then the row's scale and the whole numbers of least error together."""
        super().fit(w, importance)
        out, groups = self.scale.shape
        beyond = 0, groups * self.group_size - w.shape[1]  # zeros, which have no error
        weight = None if importance is None else pad(relative_importance(importance), beyond).view(groups, -1)
        grouped = pad(w, beyond).view(out, groups, -1)
        rows = chunk_rows(grouped)
        chunks = zip(grouped.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True)
        parts = [_search(_WholeScales(part, zero, weight), scale) for part, scale, zero in chunks]
        self.row_scale = torch.cat([part.row_scale for part in parts])
        self.group_scale = torch.cat([part.group_scale for part in parts])
        self._combine()

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        """As the protocol says; the row's scale stays as `fit` of the whole matrix made it."""
        self._fit_alone(w, group, importance)
        weight = None if importance is None else relative_importance(importance)[None]
        best = _WholeScales(w[:, None, :], self.zero[:, group : group + 1], weight)
        best.offer(self.row_scale, [torch.full_like(best.largest, k) for k in range(1, int(best.largest.max()) + 1)])
        self.group_scale[:, group] = best.group_scale[:, 0]
        self._combine()

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields = super().pack(codes)
        return {**fields, "scale": self.row_scale.to(torch.float16), "group_scale": self.group_scale.to(torch.uint8)}

    def _combine(self) -> None:
        self.scale = self.row_scale * self.group_scale
        self.divisor = self._divisor(self.scale)


class _WholeScales:
    """The best row scales [rows, 1] and whole numbers [rows, groups] offered so far for w [rows, groups, n]."""

    def __init__(self, w: Tensor, zero: Tensor, weight: Tensor | None) -> None:
        self.w, self.zero, self.weight = w, zero, weight
        self.largest = largest_group_scale(zero)
        self.error = w.new_full((len(w), 1), torch.inf)
        self.row_scale, self.group_scale = torch.zeros_like(self.error), torch.ones_like(zero)

    def offer(self, row_scale: Tensor, candidates: Sequence[Tensor]) -> None:
        """row_scale [rows, 1]: taken where it beats the best, each group with the best of its candidates."""
        row_scale = fp16_scale(row_scale)
        least, chosen = torch.full_like(self.zero, torch.inf), torch.ones_like(self.zero)
        for candidate in candidates:
            whole = torch.minimum(candidate, self.largest).clamp(min=1)
            scale = (row_scale * whole)[..., None]
            squares = self._codes(scale).mul_(scale).sub_(self.w).square_()
            error = (squares if self.weight is None else squares.mul_(self.weight)).sum(-1)
            better = error < least
            least, chosen = torch.where(better, error, least), torch.where(better, whole, chosen)
        total = least.sum(1, keepdim=True)
        better = total < self.error
        self.error = torch.where(better, total, self.error)
        self.row_scale = torch.where(better, row_scale, self.row_scale)
        self.group_scale = torch.where(better, chosen, self.group_scale)

    def least_squares(self) -> Tensor:
        """The best row scale [rows, 1] for the codes as they are."""
        levels = self._codes((self.row_scale * self.group_scale)[..., None]).mul_(self.group_scale[..., None])
        weighted = levels if self.weight is None else levels * self.weight
        along, power = (weighted * self.w).sum((1, 2)), (weighted * levels).sum((1, 2))
        return torch.where(power > 0, along / power, self.row_scale[:, 0])[:, None]

    def _codes(self, scale: Tensor) -> Tensor:
        """The nearest codes less the zero point, for scale [rows, groups, 1]."""
        inverse, zero = torch.where(scale == 0, 0.0, 1 / scale), self.zero[..., None]
        return (self.w * inverse).add_(zero + 0.5).floor_().clamp_(0, TOP).sub_(zero)


def _search(best: _WholeScales, free: Tensor) -> _WholeScales:
    """`best`, after offers near `free` [rows, groups] >= 0, the scales that the groups would have by themselves."""

    def near(row_scale: Tensor) -> list[Tensor]:
        middle = torch.where(row_scale == 0, 1.0, free / row_scale).round_()
        return [middle - 1, middle, middle + 1]

    start = (free / best.largest).amax(1, keepdim=True)
    for fraction in FRACTIONS:
        best.offer(start * fraction, near(start * fraction))
    for _ in range(LEAST_SQUARES_STEPS):
        row_scale = best.least_squares()
        best.offer(row_scale, near(row_scale))
    return best
