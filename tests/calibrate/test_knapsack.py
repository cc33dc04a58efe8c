"""The knapsack against trying everything, and the proof it gives where it cannot."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitpalette.calibrate import knapsack
from bitpalette.calibrate.knapsack import KnapsackError, choose

Candidates = list[tuple[float, int]]
CANDIDATE = st.tuples(st.floats(0, 1e3) | st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 25))
ITEMS = st.lists(st.lists(CANDIDATE, min_size=1, max_size=5), min_size=1, max_size=5)


def split(items: list[Candidates]) -> tuple[list[list[float]], list[list[int]]]:
    return [[c for c, _ in item] for item in items], [[s for _, s in item] for item in items]


def least(items: list[Candidates], budget: int) -> float:
    """By trying all choices."""
    fits = (c for c in itertools.product(*items) if sum(size for _, size in c) <= budget)
    return min(sum(cost for cost, _ in choice) for choice in fits)


@given(ITEMS, st.integers(0, 60))
def test_nothing_is_cheaper(items: list[Candidates], room: int) -> None:
    costs, sizes = split(items)
    budget = sum(map(min, sizes)) + room
    found = choose(costs, sizes, budget)
    best = least(items, budget)
    assert found.exact and found.gap == 0
    assert found.cost == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert found.size == sum(sizes[i][j] for i, j in enumerate(found.index)) <= budget
    assert found.cost == pytest.approx(sum(costs[i][j] for i, j in enumerate(found.index)))
    assert found.bound <= best * (1 + 1e-9) + 1e-9
    assert found.price >= 0


@given(ITEMS, st.integers(0, 60))
def test_greedy_alone_tells_its_gap(items: list[Candidates], room: int) -> None:
    costs, sizes = split(items)
    budget = sum(map(min, sizes)) + room
    best = least(items, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "MOST_STATES", 0)
        found = choose(costs, sizes, budget)
    assert found.size <= budget
    assert found.cost >= best * (1 - 1e-12)
    assert found.cost - found.gap <= best * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("unit", [64, 1])
def test_a_large_model_takes_no_time(unit: int) -> None:
    """80 layers with 40 candidates each, sizes in steps of `unit` or any."""
    rng = np.random.default_rng(0)
    scale = rng.lognormal(0, 1, 80)
    rates = np.arange(1, 41) / 8
    costs = scale[:, None] * 4.0**-rates * rng.lognormal(0, 0.2, (80, 40))
    sizes = np.arange(1, 41) * (64 if unit == 64 else rng.integers(1000, 90_000, (80, 1)))
    sizes = np.broadcast_to(sizes, (80, 40))
    start = time.monotonic()
    found = choose(costs.tolist(), sizes.tolist(), int(sizes.sum(1).mean() * 40))
    assert time.monotonic() - start < 2  # 0.02 s on an idle core
    assert found.exact
    assert found.bound <= found.cost <= found.bound * 1.01


def test_more_budget_costs_no_more() -> None:
    rng = np.random.default_rng(1)
    costs, sizes = rng.random((12, 6)).tolist(), rng.integers(1, 50, (12, 6)).tolist()
    smallest = sum(map(min, sizes))
    found = [choose(costs, sizes, smallest + room).cost for room in range(0, 200, 7)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found))
    assert choose(costs, sizes, 10**6).cost == pytest.approx(sum(map(min, costs)))


@pytest.mark.parametrize(
    ("costs", "sizes", "budget", "message"),
    [
        ([[1.0], [2.0]], [[3], [4]], 6, "size 7, the budget is 6"),
        ([[1.0]], [[3], [4]], 6, "costs of 1 items, sizes of 2"),
        ([[]], [[]], 6, "item 0 has 0 costs"),
        ([[1.0, 2.0]], [[1]], 6, "2 costs and 1 sizes"),
        ([[float("nan")]], [[1]], 6, "finite"),
        ([[1.0]], [[-1]], 6, "not negative"),
    ],
)
def test_refusals(costs: list[list[float]], sizes: list[list[int]], budget: int, message: str) -> None:
    with pytest.raises(KnapsackError, match=message):
        choose(costs, sizes, budget)
