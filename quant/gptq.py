"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, feeding each column's error to those not yet coded.

With H the input's second moment and U the upper Cholesky factor of its damped inverse (H^-1 = U^T U), rounding column
i with error e_i = (w_i - q_i) / U_ii is followed by w_j -= e_i U_ij for every j > i: the change of the columns still
free that best makes up for it in tr(D H D^T). Columns go in descending order of diag(H) ("activation order"), so that
those that matter most are rounded while most others are still free; scales are chosen first, from the weights as they
are, so the order needs no index on disk ("static groups").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import get_codec
from .factor import DAMPING, inverse_factor
from .scheme import Scheme, SchemeError
from .solution import Solution
from .stats import Stats

BLOCK = 128
"""Columns whose feedback to the rest is applied in one matrix product; it changes the time, not the result."""


class Gptq:
    name = "gptq"
    needs_stats = True
    needs_fisher = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Solution:
        """Fields for w, float32 [out, in]. ValueError where the Hessian is not finite, SchemeError for block codes."""
        if stats is None:
            raise ValueError("gptq needs calibration statistics")
        if scheme.block != 1:
            raise SchemeError(f"gptq rounds column by column, {scheme} codes {scheme.block} at a time: use solver ldlq")
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        energy = stats.hessian.diagonal()
        grid.fit(w, energy / energy.mean().clamp(min=1e-30) + DAMPING)
        order = torch.argsort(energy, descending=True, stable=True)
        columns = order.cpu()  # a grid may ask for the number of each: one copy from a GPU in place of one a column
        feedback = inverse_factor(stats.hessian[order][:, order])
        rest = w[:, order].T.contiguous()  # [in, out], a column of w is a contiguous row
        codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            errors = torch.empty_like(rest[start:stop])
            for i in range(start, stop):
                code, value = grid.nearest(rest[i][:, None], columns[i : i + 1])
                codes[i] = code[:, 0]
                errors[i - start] = (rest[i] - value[:, 0]) / feedback[i, i]
                rest[i + 1 : stop].addr_(feedback[i, i + 1 : stop], errors[i - start], alpha=-1)
            rest[stop:].addmm_(feedback[start:stop, stop:].T, errors, alpha=-1)
        natural = torch.empty_like(codes.T)
        natural[:, order] = codes.T
        return Solution(grid.pack(natural))


SOLVER = Gptq()
