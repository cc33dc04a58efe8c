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
from .scheme import Scheme
from .stats import Stats

DAMPING = 0.01
"""Share of the mean of diag(H) added to the diagonal, as in the paper."""

BLOCK = 128
"""Columns whose feedback to the rest is applied in one matrix product; it changes the time, not the result."""


class Gptq:
    name = "gptq"
    needs_stats = True

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> dict[str, Tensor]:
        """Fields for w, float32 [out, in]. ValueError where the Hessian is not finite."""
        if stats is None:
            raise ValueError("gptq needs calibration statistics")
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        energy = stats.hessian.diagonal()
        grid.fit(w, energy / energy.mean().clamp(min=1e-30) + DAMPING)
        order = torch.argsort(energy, descending=True, stable=True)
        feedback = inverse_factor(stats.hessian[order][:, order])
        rest = w[:, order].T.contiguous()  # [in, out], a column of w is a contiguous row
        codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            errors = torch.empty_like(rest[start:stop])
            for i in range(start, stop):
                code, value = grid.nearest(rest[i][:, None], order[i : i + 1])
                codes[i] = code[:, 0]
                errors[i - start] = (rest[i] - value[:, 0]) / feedback[i, i]
                rest[i + 1 : stop].addr_(feedback[i, i + 1 : stop], errors[i - start], alpha=-1)
            rest[stop:].addmm_(feedback[start:stop, stop:].T, errors, alpha=-1)
        natural = torch.empty_like(codes.T)
        natural[:, order] = codes.T
        return grid.pack(natural)


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, in the dtype of H [n, n].

    From one Cholesky factorisation of H with rows and columns reversed: H = R R^T with R upper triangular, U = R^-1.
    float32 first; where that fails or leaves the range, float64; where that fails, ten times the damping, and so on.
    Columns that calibration never saw (zero on the diagonal) get the mean: they are rounded without feedback.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinite values; the calibration activations overflowed")
    mean = float(hessian.diagonal().mean())
    if mean <= 0:  # no input at all
        return torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while True:
        for dtype in (torch.float32, torch.float64):
            h = hessian.to(dtype, copy=True)
            h.diagonal().add_(torch.where(h.diagonal() == 0, mean, damping * mean))
            lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
            if int(info) == 0:
                eye = torch.eye(h.shape[0], dtype=dtype, device=h.device)
                factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).to(hessian.dtype)
                if bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all()):
                    return factor
        damping *= 10


SOLVER = Gptq()
