"""The multiple-choice knapsack: of every item one candidate, the sizes within one budget, the costs least.

Lagrangian relaxation over the lower convex hulls of the items (the linear program; Sinha and Zoltners, Operations
Research 27, 1979) gives a lower bound that no choice can pass, and a first choice, which is then filled greedily. What
is left of the gap is closed by dynamic programming over the candidates whose reduced costs fit into it, keeping the
states that no other state dominates (Nemhauser and Ullmann, Management Science 15, 1969).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_STATES = 200_000
"""Of one stage of the dynamic programming; with more of them the greedy choice stays, and its gap is told."""


class KnapsackError(ValueError):
    """No choice fits, or the candidates make no sense. The message says the least budget."""


@dataclass(frozen=True)
class Choice:
    """index: of every item's candidate. bound: no choice within the budget costs less. price: what one unit of size is
    worth in cost at the budget (the multiplier). exact: it is proven that none is cheaper."""

    index: tuple[int, ...]
    cost: float
    size: int
    bound: float
    price: float
    exact: bool

    @property
    def gap(self) -> float:
        """How much cheaper another choice could be at most."""
        return 0.0 if self.exact else max(self.cost - self.bound, 0.0)


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Choice:
    """costs[i][j], sizes[i][j] of candidate j of item i; sizes are whole numbers, 0 or more.

    KnapsackError where even the smallest candidates are larger than the budget, or a cost is not finite.
    """
    items = _items(costs, sizes)
    least = sum(int(item.size[0]) for item in items)
    if least > budget:
        raise KnapsackError(f"the smallest choice has size {least}, the budget is {budget}")
    incumbent, bound, price = _relax(items, budget)
    incumbent = _fill(items, incumbent, budget)
    cost = _cost(items, incumbent)
    found = _close(items, price, bound, cost, budget) if cost > bound else None
    if found is not None:
        better, exact = found
        incumbent = incumbent if better is None else better
    else:
        exact = True
    return Choice(
        index=tuple(int(item.index[j]) for item, j in zip(items, incumbent, strict=True)),
        cost=_cost(items, incumbent),
        size=_size(items, incumbent),
        bound=bound,
        price=price,
        exact=exact,
    )


@dataclass(frozen=True)
class _Item:
    """The candidates that no other dominates, smallest first: size rises, cost falls. index: as they were given."""

    index: Ints
    size: Ints
    cost: Floats

    def hull(self) -> list[int]:
        """The corners of the lower convex hull of (size, cost)."""
        corners: list[int] = []
        for j in range(len(self.size)):
            while len(corners) >= 2 and self._slope(corners[-2], corners[-1]) >= self._slope(corners[-1], j):
                corners.pop()
            corners.append(j)
        return corners

    def _slope(self, a: int, b: int) -> float:
        return float((self.cost[b] - self.cost[a]) / (self.size[b] - self.size[a]))


def _items(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> list[_Item]:
    if len(costs) != len(sizes):
        raise KnapsackError(f"costs of {len(costs)} items, sizes of {len(sizes)}")
    items = []
    for i, (item_costs, item_sizes) in enumerate(zip(costs, sizes, strict=True)):
        cost, size = np.asarray(item_costs, np.float64), np.asarray(item_sizes, np.int64)
        if cost.shape != size.shape or cost.size == 0:
            raise KnapsackError(f"item {i} has {cost.size} costs and {size.size} sizes; it needs as many, at least one")
        if not np.isfinite(cost).all() or not (size >= 0).all():
            raise KnapsackError(f"item {i}: costs {cost.tolist()} must be finite, sizes {size.tolist()} not negative")
        order = np.lexsort((cost, size))
        before = np.minimum.accumulate(np.concatenate(([np.inf], cost[order][:-1])))
        kept = order[cost[order] < before]
        items.append(_Item(kept, size[kept], cost[kept]))
    return items


def _cost(items: list[_Item], at: list[int]) -> float:
    return float(sum(item.cost[j] for item, j in zip(items, at, strict=True)))


def _size(items: list[_Item], at: list[int]) -> int:
    return int(sum(item.size[j] for item, j in zip(items, at, strict=True)))


def _relax(items: list[_Item], budget: int) -> tuple[list[int], float, float]:
    """(choice within the budget, lower bound, price): steps along the hulls, the steepest first."""
    hulls = [item.hull() for item in items]
    steps = []  # (slope, item, position on its hull)
    for i, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        steps += [(item._slope(a, b), i, at) for at, (a, b) in enumerate(itertools.pairwise(hull))]
    choice = [hull[0] for hull in hulls]
    left = budget - _size(items, choice)
    price, bound = 0.0, None
    blocked: set[int] = set()
    for slope, i, at in sorted(steps):
        a, b = hulls[i][at], hulls[i][at + 1]
        step = int(items[i].size[b] - items[i].size[a])
        if i not in blocked and step <= left:
            choice[i] = b
            left -= step
            continue
        blocked.add(i)
        if bound is None:
            price = -slope
            bound = sum(float((item.cost + price * item.size).min()) for item in items) - price * budget
    return choice, _cost(items, choice) if bound is None else bound, price


def _fill(items: list[_Item], choice: list[int], budget: int) -> list[int]:
    """Single exchanges, the largest gain first, until none fits."""
    choice, left = list(choice), budget - _size(items, choice)
    while True:
        best: tuple[float, int, int] | None = None
        for i, item in enumerate(items):
            j = int(np.searchsorted(item.size, item.size[choice[i]] + left, side="right")) - 1
            gain = float(item.cost[choice[i]] - item.cost[j])
            if gain > 0 and (best is None or gain > best[0]):
                best = (gain, i, j)
        if best is None:
            return choice
        _, i, j = best
        left -= int(items[i].size[j] - items[i].size[choice[i]])
        choice[i] = j


def _close(
    items: list[_Item], price: float, bound: float, cost: float, budget: int
) -> tuple[list[int] | None, bool] | None:
    """(a choice cheaper than `cost`, None where there is none; whether the search was complete)."""
    room = cost - bound
    rests = [item.cost + price * item.size for item in items]
    reduced = [rest - rest.min() for rest in rests]
    kept = [np.flatnonzero(extra < room) for extra in reduced]
    least = np.array([int(item.size[j].min()) for item, j in zip(items, kept, strict=True)] + [0])
    after = np.cumsum(least[::-1])[::-1]  # of all items from here on
    size, total, extra = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for i, (item, j, rest) in enumerate(zip(items, kept, reduced, strict=True)):
        new_size = (size[:, None] + item.size[j]).ravel()
        new_extra = (extra[:, None] + rest[j]).ravel()
        new_total = (total[:, None] + item.cost[j]).ravel()
        state = np.flatnonzero((new_size + after[i + 1] <= budget) & (new_extra < room))
        state = state[np.lexsort((new_total[state], new_size[state]))]
        before = np.minimum.accumulate(np.concatenate(([np.inf], new_total[state][:-1])))
        state = state[new_total[state] < before]
        if len(state) == 0:
            return None, True
        if len(state) > MOST_STATES:
            return None, False
        trail.append((state // len(j), j[state % len(j)]))
        size, total, extra = new_size[state], new_total[state], new_extra[state]
    at = int(total.argmin())
    if not total[at] < cost:
        return None, True
    choice: list[int] = []
    for parent, j in reversed(trail):
        choice.append(int(j[at]))
        at = int(parent[at])
    return choice[::-1], True
