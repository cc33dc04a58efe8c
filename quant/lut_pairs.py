"""Codec `lut`, dims = 2: one code for two neighbouring columns, points of a Gaussian grid (HIGGS, arXiv 2411.17525).

A last column without a neighbour is paired with a zero, which is coded and not decoded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bitstream import pack_bits
from .clipping import least_error_scale
from .codec import group_count, group_of_column
from .gaussian_grid import gaussian_grid

if TYPE_CHECKING:
    from .lut import LutScheme

LADDER = (7.0, 4.5, 3.0, 2.1, 1.8, 1.55, 1.35, 1.2, 1.08, 0.97, 0.87, 0.77, 0.66)
"""Scales tried, of the root mean square: the grid is made for N(0, 1), whose groups have their best near 1; rows with
outliers have it above, and 7 times a grid that ends at 3.4 reaches a weight of 24 sigma."""

RASTER = 256
"""Squares a side that the plane is divided into: look-ups of 64 KiB a candidate, a byte a coordinate."""


class PairGrid:
    """The table [entries, 2] and scales [out, groups] of one matrix; all fp16 values."""

    def __init__(self, scheme: LutScheme, shape: tuple[int, int], device: torch.device) -> None:
        self.scheme, self.shape = scheme, shape
        self.group_size = scheme.group_size
        self.group = group_of_column(shape[1], self.group_size, device)
        self.scale = torch.ones(shape[0], group_count(shape[1], self.group_size), dtype=torch.float32, device=device)
        self.points = nearest_points(scheme.entries, device)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        gs = self.group_size or self.shape[1]
        whole = self.shape[1] // gs * gs
        if whole:
            weight = None if importance is None else importance[:whole].view(-1, gs)
            self.scale[:, : whole // gs] = self._best_scale(w[:, :whole].reshape(self.shape[0], -1, gs), weight)
        if whole < self.shape[1]:  # a short last group
            self.fit_group(w[:, whole:], whole // gs, None if importance is None else importance[whole:])

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        self.scale[:, group] = self._best_scale(w[:, None], None if importance is None else importance[None])[:, 0]

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale[:, self.group[columns]]
        pairs = _even(w * torch.where(scale == 0, scale, 1 / scale)).view(w.shape[0], -1, 2)
        code = self.points.nearest(pairs)
        values = self.points.table.index_select(0, code.flatten()).view(w.shape[0], -1)[:, : w.shape[1]]
        return code.to(torch.uint8), values * scale

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {
            "codes": pack_bits(codes, self.scheme.bits).flatten(),
            "table": self.points.table.to(torch.float16),
            "scale": self.scale.to(torch.float16),
        }

    def _best_scale(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Scales of least error [rows, groups] for w [rows, groups, n]."""
        start = w.square().mean(-1).sqrt()
        w = _even(w)
        importance = None if importance is None else _even(importance)

        def level(u: Tensor, zero: Tensor) -> Tensor:
            return self.points.about_nearest(u)

        return least_error_scale(w, level, [(start, torch.zeros_like(start))], importance, ladder=LADDER)[0]


class NearestPoint:
    """The nearest of the points `table` [entries, 2] by a look-up in even squares of the plane.

    Each square knows the points that are nearest to some place in it (3 at most for 256 points): for a place in the
    square and the point p nearest to its centre, none is farther from the centre than p by more than the diagonal.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.x, self.y = table.T.contiguous()
        self.half_width = 1.25 * float(table.abs().max())
        self.per_unit = RASTER / (2 * self.half_width)
        centre = (torch.arange(RASTER, device=table.device) + 0.5) / self.per_unit - self.half_width
        reach = 2**0.5 / self.per_unit * (1 + 1e-3)  # 1e-3: for what rounding puts into the next square
        lists = []
        for row in centre.split(16):
            y, x = torch.meshgrid(row, centre, indexing="ij")
            distance = torch.hypot(x.flatten()[:, None] - self.x, y.flatten()[:, None] - self.y)
            ordered, index = distance.sort(stable=True)
            lists.append(torch.where(ordered <= ordered[:, :1] + reach, index, index[:, :1]))
        ordered = torch.cat(lists)
        self.about = table[ordered[:, 0]].view(torch.float64)[:, 0]  # eight bytes a point, moved as one number
        most = int((ordered != ordered[:, :1]).sum(1).max()) + 1
        self.candidates = ordered[:, :most].sort().values.T.to(torch.uint8).contiguous()

    def nearest(self, pairs: Tensor) -> Tensor:
        """Index of the nearest point, int32 [...], for pairs [..., 2]; of several at one distance the first."""
        px, py = pairs.reshape(-1, 2).T.contiguous()
        square = self._square(pairs.clone())
        best = torch.full_like(px, torch.inf)
        code = torch.zeros_like(square)
        for candidates in self.candidates:
            k = candidates.index_select(0, square).to(torch.int32)
            distance = self._distance(px, py, self.x.index_select(0, k), self.y.index_select(0, k))
            closer = distance < best
            best = torch.where(closer, distance, best)
            code = torch.where(closer, k, code)
        outside = torch.nonzero(torch.maximum(px.abs(), py.abs()) >= self.half_width)[:, 0]
        for part in outside.split(1 << 14):  # temporaries of 16 MiB for 256 points
            distance = self._distance(px[part, None], py[part, None], self.x, self.y)
            code[part] = distance.argmin(1).to(torch.int32)
        return code.view(pairs.shape[:-1])

    def about_nearest(self, u: Tensor) -> Tensor:
        """The nearest points themselves, float32 as u [..., 2 n], which is overwritten: exact but for squares that
        several points share, and outside of all squares. 1.3 ns a weight, for the search of scales, which asks some
        twenty times for every weight."""
        return self.about.index_select(0, self._square(u)).view(torch.float32).view(u.shape)

    def _square(self, u: Tensor) -> Tensor:
        """Index of the square, int32 [pairs], that each pair of u [..., 2 n] is in; u is overwritten."""
        byte = u.add_(self.half_width).mul_(self.per_unit).clamp_(0, RASTER - 1).to(torch.uint8)
        return byte.flatten().view(torch.uint16).to(torch.int32)  # x + 256 y

    @staticmethod
    def _distance(x: Tensor, y: Tensor, px: Tensor, py: Tensor) -> Tensor:
        return (px - x).square_().add_((py - y).square_())


@lru_cache(maxsize=8)
def nearest_points(entries: int, device: torch.device) -> NearestPoint:
    """The Gaussian grid of so many points as it is stored, in fp16."""
    return NearestPoint(torch.tensor(gaussian_grid(entries), dtype=torch.float16, device=device).float())


def _even(w: Tensor) -> Tensor:
    """w [..., n], contiguous, with a zero appended where n is odd."""
    return torch.nn.functional.pad(w, (0, 1)) if w.shape[-1] % 2 else w.contiguous()
