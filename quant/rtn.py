"""Round to nearest, with MSE-optimal clipping (the grid's own fit), weighted by the input's energy where known."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import get_codec
from .scheme import Scheme
from .stats import Stats

CHUNK = 1 << 22
"""Weights rounded at a time: temporaries of 16 MiB, beside embeddings of hundreds."""


class RoundToNearest:
    name = "rtn"
    needs_stats = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> dict[str, Tensor]:
        """Fields of the nearest codes; with statistics the clipping weighs each column by its mean square input."""
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        grid.fit(w, None if stats is None else stats.hessian.diagonal())
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for columns in torch.arange(w.shape[1], device=w.device).split(max(1, CHUNK // w.shape[0])):
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            codes[:, part] = grid.nearest(w[:, part], columns)[0]
        return grid.pack(codes)


SOLVER = RoundToNearest()
