"""SqueezeLLM (Kim et al., arXiv 2306.07629): a table for every row, k-means weighted by the Fisher diagonal.

Rounding a weight by d raises the loss by about F d^2 / 2, F being the mean squared gradient of the loss by that weight;
the levels of a row are those of the least sum of F d^2. The few outliers that the paper keeps apart (its "dense and
sparse") are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lloyd import optimal_kmeans_1d
from .lut import LutGrid, LutScheme
from .scheme import Scheme, SchemeError
from .solution import Solution
from .stats import Stats

WANTED = 'codec lut with table "kmeans", table_scope "row" and scaled false'

CHUNK = 1 << 22
"""Weights coded at a time: temporaries of 32 MiB."""


class SqueezeLlm:
    name = "squeezellm"
    needs_stats = True
    needs_fisher = True

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Solution:
        """Fields for w, float32 [out, in], its statistics with `fisher`.

        SchemeError for another scheme than `WANTED`, or transforms, ValueError without usable Fisher numbers,
        NativeError where the native module was not built.
        """
        if not (isinstance(scheme, LutScheme) and scheme.table_scope == "row" and not scheme.scaled):
            raise SchemeError(f"squeezellm fits {WANTED}; got {scheme}")
        if scheme.transforms:
            raise SchemeError(
                f"the Fisher diagonal is of the weight as it stands: squeezellm takes no transforms; got {scheme}"
            )
        fisher = None if stats is None else stats.fisher
        if fisher is None:
            raise ValueError(
                "squeezellm needs the Fisher diagonal of each weight in its calibration statistics (Stats.fisher)"
            )
        if tuple(fisher.shape) != tuple(w.shape):
            raise ValueError(f"the Fisher diagonal {list(fisher.shape)} is not of the weight {list(w.shape)}")
        if not (float(fisher.min()) >= 0 and bool(fisher.isfinite().all())):
            raise ValueError(f"the Fisher diagonal {list(fisher.shape)} holds negative, NaN or infinite numbers")
        grid = LutGrid(scheme, (w.shape[0], w.shape[1]), w.device)
        grid.set_table(optimal_kmeans_1d(w, fisher, scheme.entries))
        columns = torch.arange(w.shape[1], device=w.device).split(max(1, CHUNK // w.shape[0]))
        codes = [grid.nearest(w[:, int(c[0]) : int(c[-1]) + 1], c)[0] for c in columns]
        return Solution(grid.pack(torch.cat(codes, 1)))


SOLVER = SqueezeLlm()
