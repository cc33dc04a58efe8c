"""Round to nearest, with MSE-optimal clipping (the grid's own fit), weighted by the input's energy where known."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import get_codec
from .scheme import Scheme
from .stats import Stats


class RoundToNearest:
    name = "rtn"
    needs_stats = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> dict[str, Tensor]:
        """Fields of the nearest codes; with statistics the clipping weighs each column by its mean square input."""
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        grid.fit(w, None if stats is None else stats.hessian.diagonal())
        codes, _ = grid.nearest(w, torch.arange(w.shape[1], device=w.device))
        return grid.pack(codes)


SOLVER = RoundToNearest()
