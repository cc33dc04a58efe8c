"""Which weight gets which scheme: the cheapest choice within one budget or several.

Every item (a weight, weights that must share a scheme, the cache of a layer) has candidates, each with a cost in KL
divergence and amounts of what budgets limit: bits, bytes, seconds. One budget is a multiple-choice knapsack
(calibrate/knapsack.py, exact or with a certified gap); several at once go to HiGHS, through scipy.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .knapsack import KnapsackError, choose
from .plan import PlanError

MILP_SECONDS = 20.0
GRAIN = 1 << 22
"""Amounts that are no whole numbers (seconds) become whole numbers of a budget's so manieth part, rounded up."""


@dataclass(frozen=True)
class Candidate:
    """name: what is chosen (a scheme, a cache format). cost: predicted KL divergence, nats a token. amounts: {budget's
    name: how much of it this takes}; none is 0."""

    name: object
    cost: float
    amounts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Limit:
    """At most `most` of `name`, of which `fixed` is spent whatever is chosen. unit: as the user reads it, of
    amounts divided by told_per; whole: amounts are whole numbers."""

    name: str
    most: float
    fixed: float = 0.0
    unit: str = ""
    whole: bool = True
    told_per: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """index: of every item's candidate. bound: no choice costs less. exact: none is cheaper. prices: {limit: cost
    of one unit at the budget}, where the solver tells."""

    index: tuple[int, ...]
    cost: float
    bound: float
    exact: bool
    seconds: float
    amounts: dict[str, float]
    prices: dict[str, float]

    @property
    def gap(self) -> float:
        return 0.0 if self.exact else max(self.cost - self.bound, 0.0)


def allocate(items: Sequence[Item], limits: Sequence[Limit]) -> Chosen:
    """The cheapest choice. PlanError, in the user's units, where nothing fits: by how much, and what the least is."""
    if not limits:
        raise PlanError("an allocation needs a budget: --bits, --size, --memory with --context, or --tokens-per-second")
    for limit in limits:
        least = limit.fixed + sum(min(_amount(c, limit.name) for c in item.candidates) for item in items)
        if least > limit.most * (1 + 1e-12):
            raise PlanError(_short(limit, least))
    start = time.perf_counter()
    if len(limits) == 1:
        index, bound, exact, prices = _one(items, limits[0])
    else:
        index, bound, exact, prices = _several(items, limits)
    picked = [item.candidates[j] for item, j in zip(items, index, strict=True)]
    return Chosen(
        index=index,
        cost=sum(c.cost for c in picked),
        bound=bound,
        exact=exact,
        seconds=time.perf_counter() - start,
        amounts={limit.name: limit.fixed + sum(_amount(c, limit.name) for c in picked) for limit in limits},
        prices=prices,
    )


def _amount(candidate: Candidate, name: str) -> float:
    return candidate.amounts.get(name, 0.0)


def _short(limit: Limit, least: float) -> str:
    def told(value: float) -> str:
        plain = limit.whole and limit.told_per == 1
        return f"{value:,.0f} {limit.unit}" if plain else f"{value / limit.told_per:.4g} {limit.unit}"

    return (
        f"the budget of {told(limit.most)} for {limit.name} is short by {told(least - limit.most)}: the smallest "
        f"possible is {told(least)}; give more, or allow smaller schemes (--palette)"
    )


def _one(items: Sequence[Item], limit: Limit) -> tuple[tuple[int, ...], float, bool, dict[str, float]]:
    grain = 1.0 if limit.whole else (limit.most - limit.fixed) / GRAIN
    budget = int(np.floor((limit.most - limit.fixed) / grain + 1e-9))
    costs = [[c.cost for c in item.candidates] for item in items]
    sizes = [[int(np.ceil(_amount(c, limit.name) / grain - 1e-9)) for c in item.candidates] for item in items]
    try:
        choice = choose(costs, sizes, budget)
    except KnapsackError as error:  # of the grain: within a millionth of the budget
        raise PlanError(
            f"the budget for {limit.name} leaves no room for rounding: {error}; give a little more"
        ) from None
    return choice.index, choice.bound, choice.exact, {limit.name: choice.price / grain}


def _several(items: Sequence[Item], limits: Sequence[Limit]) -> tuple[tuple[int, ...], float, bool, dict[str, float]]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    owner = np.repeat(np.arange(len(items)), [len(item.candidates) for item in items])
    flat = [c for item in items for c in item.candidates]
    cost = np.array([c.cost for c in flat])
    scale = max(float(cost.max()), 1e-300)
    one = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(items), len(flat)))
    rows = [
        np.array([_amount(c, limit.name) for c in flat]) / max(limit.most - limit.fixed, 1e-300) for limit in limits
    ]
    found = milp(
        cost / scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(np.stack(rows), -np.inf, 1.0)],
        options={"time_limit": MILP_SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        names = " and ".join(limit.name for limit in limits)
        if found.status == 2:
            raise PlanError(f"no plan meets the budgets for {names} together; each alone can be met: give more of one")
        raise PlanError(f"no plan for {names} was found within {MILP_SECONDS:g} s: {found.message}; give one budget")
    starts = np.concatenate(([0], np.cumsum([len(item.candidates) for item in items])))
    index = tuple(int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts))
    bound = float(found.mip_dual_bound) * scale if found.mip_dual_bound is not None else float("-inf")
    return index, bound, bool(found.mip_gap <= 1e-6), {}
