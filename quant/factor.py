"""The Cholesky factor of the damped inverse Hessian, which error feedback runs on."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean of diag(H) added to the diagonal, as in GPTQ's paper (arXiv 2210.17323)."""


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
