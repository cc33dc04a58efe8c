"""The cheapest choice within one budget or several, against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from bitpalette.calibrate.allocate import Candidate, Item, Limit, allocate
from bitpalette.calibrate.plan import PlanError


def problem(rng: random.Random, items: int, names: tuple[str, ...]) -> list[Item]:
    found = []
    for i in range(items):
        candidates = []
        for j in range(rng.randint(1, 4)):
            amounts = {name: float(rng.randint(1, 30)) for name in names}
            candidates.append(Candidate(f"{i}.{j}", rng.random(), amounts))
        found.append(Item((str(i),), tuple(candidates)))
    return found


def best(items: list[Item], limits: list[Limit]) -> float | None:
    costs = []
    for choice in itertools.product(*(item.candidates for item in items)):
        spent = {m.name: m.fixed + sum(c.amounts[m.name] for c in choice) for m in limits}
        if all(spent[m.name] <= m.most for m in limits):
            costs.append(sum(c.cost for c in choice))
    return min(costs, default=None)


@pytest.mark.parametrize("names", [("bits",), ("size", "seconds"), ("size", "bits", "memory")], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_cheaper(names: tuple[str, ...], seed: int) -> None:
    rng = random.Random(seed)
    items = problem(rng, 5, names)
    limits = [Limit(name, rng.randint(40, 90), fixed=rng.choice([0, 7])) for name in names]
    want = best(items, limits)
    if want is None:
        with pytest.raises(PlanError, match=r"short by|together"):
            allocate(items, limits)
        return
    found = allocate(items, limits)
    assert abs(found.cost - want) <= 1e-9 and found.bound <= want + 1e-6 and found.exact and found.gap == 0
    for limit in limits:
        spent = limit.fixed + sum(
            item.candidates[j].amounts[limit.name] for item, j in zip(items, found.index, strict=True)
        )
        assert found.amounts[limit.name] == spent <= limit.most


def test_amounts_that_are_no_whole_numbers() -> None:
    """Seconds: rounded up by less than a millionth of the budget, so what fits with room is found."""
    fast, slow = Candidate("fast", 1.0, {"seconds": 1e-3}), Candidate("slow", 0.1, {"seconds": 3e-3})
    items = [Item((str(i),), (fast, slow)) for i in range(10)]
    found = allocate(items, [Limit("seconds", 0.0201, unit="s", whole=False)])
    assert sum(j for j in found.index) == 5 and found.amounts["seconds"] <= 0.0201


def test_what_cannot_be_says_by_how_much() -> None:
    items = [Item(("a",), (Candidate("x", 0.0, {"size": 700.0}), Candidate("y", 1.0, {"size": 400.0})))]
    with pytest.raises(PlanError, match=r"of 900 bytes for size is short by 500 bytes.* possible is 1,400 bytes"):
        allocate(items, [Limit("size", 900, fixed=1000, unit="bytes")])
    with pytest.raises(PlanError, match="needs a budget"):
        allocate(items, [])


def test_budgets_that_only_exclude_each_other() -> None:
    small, quick = (
        Candidate("small", 0.0, {"size": 1.0, "seconds": 9.0}),
        Candidate("q", 0.0, {"size": 9.0, "seconds": 1.0}),
    )
    items = [Item((str(i),), (small, quick)) for i in range(4)]
    with pytest.raises(PlanError, match="no plan meets the budgets for size and seconds together"):
        allocate(items, [Limit("size", 10), Limit("seconds", 10)])
