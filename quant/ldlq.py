"""LDLQ: error feedback for codes of any block size (QuIP, Chee et al., arXiv 2307.13304, with blocks as in QuIP#).

GPTQ, block by block: with H^-1 = U^T U (U upper triangular), coding a block b of columns with error E = W_b - Q_b is
followed by W_j -= E U_bb^-1 U_bj for all later columns j, the change that best makes up for it in tr(D H D^T). What
remains is the sum over blocks of tr(E_b D_b E_b^T) with D_b = (U_bb^T U_bb)^-1: for errors of one size everywhere,
feedback leaves the share sum tr(D_b) / tr(H) of the error, `feedback_share`, known from the Hessian alone.

Columns are coded in their natural order; the transform `order` puts those of much energy first.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .codec import Grid, get_codec
from .factor import DAMPING
from .scheme import Scheme
from .solution import Solution
from .stats import Stats

BLOCK = 16
"""Columns coded together where the codec would take them one by one."""

PANEL = 128
"""Columns whose feedback to all later ones is one matrix product; it changes the time, not the result."""

OVERLOAD = 6.0
"""A row is coded again with a wider scale where its output error, by its energy, is this many times the median's."""

WIDER = (1.15, 1.35, 1.6)
"""Factors of such a row's scale, tried in turn: codes that end at 3.5 sigma lose a row with a weight at 5."""


@runtime_checkable
class RowScaled(Grid, Protocol):
    """A grid whose rows can be coded again with other scales, `rows_together` at a time."""

    rows_together: int

    def part(self, rows: Tensor) -> RowScaled:
        """A grid of those rows [n], whole runs of `rows_together`, with the scales they have now."""

    def widen(self, rows: Tensor, factor: float) -> None:
        """Scales of these rows times `factor`."""

    def replace(self, codes: Tensor, rows: Tensor, part: Any, part_codes: Tensor) -> None:
        """Take the codes and scales of `part`, made from `rows`, into `codes` and this grid."""


class Ldlq:
    name = "ldlq"
    needs_stats = True
    needs_fisher = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Solution:
        """Fields for w, float32 [out, in]. ValueError where the Hessian is not finite."""
        if stats is None:
            raise ValueError("ldlq needs calibration statistics")
        grid = get_codec(scheme.codec).grid(scheme, (w.shape[0], w.shape[1]), w.device)
        energy = stats.hessian.diagonal()
        grid.fit(w, energy / energy.mean().clamp(min=1e-30) + DAMPING)
        factor = stats.factor()
        codes, values = feed_back(w, grid, scheme.block, factor)
        notes = {"feedback_share": feedback_share(stats, scheme.block)}
        if isinstance(grid, RowScaled):
            repaired = _repair(w, grid, scheme.block, codes, values, factor, stats.hessian)
            if repaired:
                notes["rows_recoded"] = repaired
        return Solution(grid.pack(codes), notes)


def feed_back(w: Tensor, grid: Grid, block: int, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, values float32 [out, in]) of w [out, in], the error of each block fed to the columns after it.

    block: columns that the codec codes together. factor: float32 [in, in], upper triangular U with U^T U = H^-1
    (factor.py).
    """
    n, width = w.shape[1], block if block > 1 else BLOCK
    rest, values = w.clone(), torch.empty_like(w)
    columns = torch.arange(n, device=w.device)
    codes = []
    panel = -(-PANEL // width) * width
    for start in range(0, n, panel):
        stop = min(start + panel, n)
        errors = torch.empty(w.shape[0], stop - start, device=w.device)  # E U_bb^-1 of the panel's blocks
        for i in range(start, stop, width):
            j = min(i + width, stop)
            code, values[:, i:j] = grid.nearest(rest[:, i:j], columns[i:j])
            codes.append(code)
            error = rest[:, i:j] - values[:, i:j]
            error = torch.linalg.solve_triangular(factor[i:j, i:j], error, upper=True, left=False)
            errors[:, i - start : j - start] = error
            rest[:, j:stop].addmm_(error, factor[i:j, j:stop], alpha=-1)
        rest[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return torch.cat(codes, 1), values


def feedback_share(stats: Stats, block: int = 1) -> float:
    """rho = sum over blocks of tr(D_b) / tr(H): the share of the output error that feedback leaves, for errors of one
    size in all columns. stats: transformed as the weight is, columns in the order of coding. 1 for a diagonal Hessian
    (the damping counts, so that it is a little high).
    """
    block = block if block > 1 else BLOCK
    factor = stats.factor()
    total = torch.zeros((), dtype=torch.float64, device=factor.device)
    for i in range(0, factor.shape[0], block):
        b = factor[i : i + block, i : i + block]
        eye = torch.eye(b.shape[0], device=b.device)
        total += torch.linalg.solve_triangular(b, eye, upper=True).square().sum(dtype=torch.float64)
    trace = float(stats.hessian.diagonal().sum(dtype=torch.float64))
    return float(total) / trace if trace > 0 else 1.0


def overloaded_rows(w: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Indices of rows whose output error, relative to their energy, is more than OVERLOAD times the median."""
    error = _row_errors(w, values, hessian) / w.square().sum(1).clamp(min=1e-30)
    return torch.nonzero(~(error <= OVERLOAD * error.median()))[:, 0]


def _row_errors(w: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    error = w - values
    return ((error @ hessian) * error).sum(1)


def _repair(
    w: Tensor, grid: RowScaled, block: int, codes: Tensor, values: Tensor, factor: Tensor, hessian: Tensor
) -> int:
    """Code rows that stand far out again with wider scales, together with those they share tiles with, and keep what
    has the least error over those rows. codes, values: changed in place. Returns how many rows got another scale."""
    bad = overloaded_rows(w, values, hessian)
    recoded = 0
    for first in sorted({r // grid.rows_together * grid.rows_together for r in bad.tolist()}):
        rows = torch.arange(first, min(first + grid.rows_together, w.shape[0]), device=w.device)
        inside = bad[(bad >= first) & (bad < first + grid.rows_together)] - first
        best = start = float(_row_errors(w[rows], values[rows], hessian).sum())
        for wider in WIDER:
            part = grid.part(rows)
            part.widen(inside, wider)
            part_codes, part_values = feed_back(w[rows], part, block, factor)
            error = float(_row_errors(w[rows], part_values, hessian).sum())
            if error < best:
                best = error
                grid.replace(codes, rows, part, part_codes)
                values[rows] = part_values
        recoded += len(inside) if best < start else 0
    return recoded


SOLVER = Ldlq()
