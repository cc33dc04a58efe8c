"""What calibration knows of one layer's input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .factor import inverse_factor

CHUNK = 1 << 22
"""Weights whose error is taken at a time: temporaries of 16 MiB."""


@dataclass
class Stats:
    """Moments of the input of one linear layer over the calibration tokens.

    hessian: float32 [in_features, in_features], mean over tokens of x x^T. The mean squared output error of a weight
        change D is tr(D hessian D^T).
    absmean: float32 [in_features], mean over tokens of |x|.
    tokens: how many tokens were seen.
    fisher: float32 [out_features, in_features], the mean squared gradient of the loss by this layer's weight, where it
        was collected; of the weight as it stands: statistics behind a transform have none.
    """

    hessian: Tensor
    absmean: Tensor
    tokens: int
    fisher: Tensor | None = None
    derived: Any = field(default=None, repr=False, compare=False, kw_only=True)
    """What `transform.derive` made of these statistics last."""
    _factor: Tensor | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        n = self.absmean.shape[0]
        if tuple(self.hessian.shape) != (n, n):
            raise ValueError(f"hessian {list(self.hessian.shape)} does not fit absmean [{n}]")
        if self.fisher is not None and (self.fisher.dim() != 2 or self.fisher.shape[1] != n):
            raise ValueError(f"fisher {list(self.fisher.shape)} is not [out_features, {n}]")

    def factor(self) -> Tensor:
        """factor.py's Cholesky factor of the damped inverse of the Hessian, computed once."""
        if self._factor is None:
            self._factor = inverse_factor(self.hessian)
        return self._factor


def output_error(w: Tensor, q: Tensor, stats: Stats | None) -> float:
    """Relative squared output error of q in place of w [out, in]: tr(D H D^T) / tr(W H W^T), D = q - w.

    Without statistics H is the identity: the relative squared weight error. 0 where w itself gives no output.
    """
    num = den = 0.0
    rows = max(1, CHUNK // w.shape[1])
    for a, b in zip(w.split(rows), q.split(rows), strict=True):
        a, d = a.float(), (b - a).float()
        if stats is None:
            num += float(d.square().sum())
            den += float(a.square().sum())
        else:
            num += float(((d @ stats.hessian) * d).sum())
            den += float(((a @ stats.hessian) * a).sum())
    return max(num, 0.0) / den if den > 0 else 0.0
