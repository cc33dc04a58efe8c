"""Tables of least squared error: Lloyd-Max for the normal distribution, and k-means of given numbers.

All satisfy Lloyd's two conditions (IEEE Trans. IT 28, 1982; Max, IRE Trans. IT 6, 1960): a boundary lies midway
between two levels, and a level is the mean of what falls to it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from .native import cpu_module

ITERATIONS = 50
_SORT = 1 << 21
"""Numbers sorted at a time: bounds the memory, 16 MiB an array in float64."""


@cache
def lloyd_max(entries: int) -> tuple[float, ...]:
    """The `entries` levels of least squared error for N(0, 1), ascending, to about 1e-11.

    Start: quantiles of N(0, 3), the density that is asymptotically best (Panter and Dite, 1951). Then Lloyd's
    iteration, each step extrapolated by Newton (its plain form needs of the order of entries^2 steps). The optimum is
    unique, the normal density being log-concave.
    """
    levels = torch.special.ndtri((torch.arange(entries, dtype=torch.float64, device="cpu") + 0.5) / entries).numpy()
    levels = levels * np.sqrt(3.0)
    for _ in range(30):
        middle = (levels[1:] + levels[:-1]) / 2
        density = np.exp(-0.5 * middle**2) / np.sqrt(2 * np.pi)
        below = torch.special.ndtr(torch.from_numpy(middle)).numpy()
        mass = np.diff(below, prepend=0.0, append=1.0)
        mean = -np.diff(density, prepend=0.0, append=0.0) / mass  # of N(0, 1) in each cell
        lower = density * (mean[1:] - middle) / mass[1:] / 2  # d mean[i + 1] / d levels[i]
        upper = density * (middle - mean[:-1]) / mass[:-1] / 2  # d mean[i] / d levels[i + 1]
        own = np.append(0.0, lower) + np.append(upper, 0.0)
        step = np.linalg.solve(np.eye(entries) - np.diag(own) - np.diag(lower, -1) - np.diag(upper, 1), mean - levels)
        levels = levels + step
        if np.abs(step).max() < 1e-11:
            break
    levels = (levels - levels[::-1]) / 2  # exactly symmetric
    return tuple(levels.tolist())


def kmeans_1d(values: Tensor, weights: Tensor, entries: int) -> Tensor:
    """Levels of least weighted squared error for every row: float32 [rows, entries], ascending; deterministic.

    values: [rows, n]; weights: [rows, n] or [n], not negative. Start: levels spread as the cube root of the density
    (Panter and Dite), then Lloyd's iteration on the sorted numbers with prefix sums. A level that nothing falls to
    stays where it is. A local optimum, as k-means is, on any device and of rows of any length; `optimal_kmeans_1d` has
    the best one, for rows.
    """
    weights = weights.expand(values.shape)
    rows = max(1, _SORT // values.shape[1])
    parts = [
        _kmeans(v.double(), w.double(), entries) for v, w in zip(values.split(rows), weights.split(rows), strict=True)
    ]
    return torch.cat(parts).float()


def optimal_kmeans_1d(values: Tensor, weights: Tensor, entries: int) -> Tensor:
    """The levels of least weighted squared error for every row: float32 [rows, entries], ascending, on values' device.

    values, weights: [rows, n], finite, weights not negative. By dynamic programming in native code (csrc/cpu/kmeans.h)
    on torch's number of threads, of the order of rows * entries * n log n. NativeError where that was not built.
    """
    rows, n = values.shape
    cpu = cpu_module()
    v, w = (t.detach().to("cpu", torch.float32).contiguous() for t in (values, weights))
    levels = torch.empty(rows, entries, device="cpu")
    cpu.kmeans_rows(v.data_ptr(), w.data_ptr(), rows, n, entries, levels.data_ptr(), torch.get_num_threads())
    return levels.to(values.device)


def _kmeans(values: Tensor, weights: Tensor, entries: int) -> Tensor:
    values, order = values.sort(-1)
    weights = weights.gather(-1, order)
    # a number of weight w, the next one a gap g away: density w/g, its cube root over the gap w^(1/3) g^(2/3)
    gap = values.diff(dim=-1, append=values[:, -1:])
    spread = (weights.pow(1 / 3) * gap.pow(2 / 3)).cumsum(-1)
    target = (torch.arange(entries, dtype=torch.float64, device=values.device) + 0.5) / entries
    at = torch.searchsorted(spread, (spread[:, -1:] * target).contiguous()).clamp(max=values.shape[1] - 1)
    levels = values.gather(-1, at)
    # a row of no more distinct numbers than levels (weights on a grid already) is kept exactly
    rank = torch.nn.functional.pad((gap[:, :-1] > 0).cumsum(-1), (1, 0))
    few = rank[:, -1:] < entries
    distinct = values[:, -1:].repeat(1, entries).scatter(-1, rank.clamp(max=entries - 1), values)
    levels = torch.where(few, distinct, levels)

    mass = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(-1), (1, 0))
    for _ in range(ITERATIONS):
        cut = torch.searchsorted(values, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        cut = torch.nn.functional.pad(torch.nn.functional.pad(cut, (1, 0)), (0, 1), value=values.shape[1])
        cell_mass = mass.gather(-1, cut).diff(dim=-1)
        cell_moment = moment.gather(-1, cut).diff(dim=-1)
        moved = torch.where(cell_mass > 0, cell_moment / cell_mass, levels).sort(-1).values
        done = bool((moved - levels).abs().max() <= 1e-6 * values.abs().max())
        levels = moved
        if done:
            break
    return levels
