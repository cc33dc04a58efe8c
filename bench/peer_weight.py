"""A weight for peers to quantize with their own tools, in seconds: few rows at random, repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpalette.kernel_bench.contender import Expected

ROWS = 32

TOLERANCE = 0.5
"""Relative error of an output: 2-bit codes of normal weights are off by 0.3, a layout misread by 1.4."""


@dataclass(frozen=True)
class Source:
    """W [out, in] whose row r is rows[r % ROWS], and the input x, float32 [most tokens, in]."""

    rows: Tensor  # float32 [ROWS, in]
    shape: tuple[int, int]
    x: Tensor

    def repeat(self, rows: Tensor) -> Tensor:
        """[ROWS, n], whatever it is coded as, for all of W: [out, n]."""
        return rows.repeat(-(-self.shape[0] // ROWS), 1)[: self.shape[0]].contiguous()

    def expected(self) -> Expected:
        """What a peer must compute, about."""
        y = (self.x @ self.rows.T).repeat(1, -(-self.shape[0] // ROWS))[:, : self.shape[0]]
        size = self.x.norm(dim=1) * float(self.rows.norm()) * math.sqrt(self.shape[0] / ROWS / self.shape[1])
        return Expected(y, size, TOLERANCE)


def make_source(shape: tuple[int, int], x: Tensor) -> Source:
    generator = torch.Generator().manual_seed(1)
    return Source(torch.randn(ROWS, shape[1], generator=generator) * 0.02, shape, x)
