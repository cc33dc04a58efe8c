"""Round to nearest, with MSE-optimal clipping (the grid's own fit), weighted by the input's energy where known."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import get_codec
from .scheme import Scheme
from .solution import Solution
from .stats import Stats

CHUNK = 1 << 22
"""Weights rounded at a time: temporaries of 16 MiB, beside embeddings of hundreds."""


class RoundToNearest:
    name = "rtn"
    needs_stats = False
    needs_fisher = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Solution:
        """Fields of the nearest codes; with statistics the clipping weighs each column by its mean square input."""
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        grid.fit(w, None if stats is None else stats.hessian.diagonal())
        step = max(1, CHUNK // w.shape[0] // scheme.block) * scheme.block
        parts = [
            grid.nearest(w[:, int(columns[0]) : int(columns[-1]) + 1], columns)[0]
            for columns in torch.arange(w.shape[1], device=w.device).split(step)
        ]
        return Solution(grid.pack(parts[0] if len(parts) == 1 else torch.cat(parts, 1)))


SOLVER = RoundToNearest()
