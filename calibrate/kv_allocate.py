"""Which bits the cache of every layer gets, from sensitivities and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..formats.kv_plan_file import LayerSensitivity
from ..quant.kv_format import BITS, KVError, KVFormat
from .knapsack import Choice, KnapsackError, choose

CLASSES = 6
"""Distinct formats of a plan. Every one is a kernel of its own and, on a GPU, a launch configuration."""

PAIRS = tuple((k, v) for k in BITS for v in BITS)
"""Candidates of a layer: bits of keys, of values."""

Layers = Mapping[int, LayerSensitivity]


@dataclass(frozen=True)
class Allocation:
    """pairs: {layer: (bits of keys, bits of values)}. costs: {layer: predicted KL, nats a token}. bits: average an
    element with gains, keys and values weighted by their elements. gap: what another allocation could save at most
    under the same set of classes."""

    pairs: dict[int, tuple[int, int]]
    costs: dict[int, float]
    bits: float
    gap: float

    @property
    def predicted(self) -> float:
        """KL divergence of the whole, nats a token."""
        return sum(self.costs.values())


def name_of(pair: tuple[int, int]) -> str:
    return f"k{pair[0]}v{pair[1]}"


def cost_of(layer: LayerSensitivity, pair: tuple[int, int], length: int | None = None) -> float:
    """Predicted KL divergence of the model with this layer's cache in `pair`, nats a token, at sequences of the
    measured length nearest to `length` (None: the longest).

    Slopes are of keys and values apart; the error of a pair, which is not quite the sum of its sides', is shared out
    in proportion.
    """
    if pair == (16, 16):
        return 0.0
    errors = layer.errors[nearest(layer.errors, length)]
    keys, values = errors.get(name_of((pair[0], 16)), 0.0), errors.get(name_of((16, pair[1])), 0.0)
    together = errors[name_of(pair)]
    if keys + values == 0:
        return max(layer.slope_k, layer.slope_v) * together
    return together * (layer.slope_k * keys + layer.slope_v * values) / (keys + values)


def nearest(lengths: Mapping[int, object] | Sequence[int], length: int | None) -> int:
    """The measured length that stands for `length`; None: the longest."""
    known = sorted(lengths)
    return known[-1] if length is None else min(known, key=lambda n: abs(n - length))


def sinks_that_pay(errors: Mapping[int, float], tokens: int) -> int:
    """How many exact first tokens are worth their bits. errors: {sinks: mean relative error}, of sequences of `tokens`.

    A bit more an element divides errors by 4, and a sink costs (16 - 3.25) / tokens of one.
    """

    def price(sinks: int) -> float:
        return math.log(max(errors[sinks], 1e-30)) + math.log(4) * (16 - 3.25) * sinks / tokens

    return min(sorted(errors), key=price)


def elements(layer: LayerSensitivity) -> int:
    """Numbers of one token."""
    return layer.kv_heads * (layer.head_dim + layer.head_dim_v)


def stored_bits(layer: LayerSensitivity, pair: tuple[int, int]) -> int:
    """Bits of one quantized token, with gains."""
    return round(elements(layer) * KVFormat(*pair).bits_per_element(layer.head_dim, layer.head_dim_v))


def within_bits(layers: Layers, bits: float, length: int | None = None, classes: int = CLASSES) -> Allocation:
    """The cheapest plan of at most `bits` bits an element on average. KVError where no plan is that small."""
    total = sum(elements(layer) for layer in layers.values())
    try:
        return _allocate(layers, stored_bits, int(total * bits + 1e-6), length, classes)
    except KnapsackError:
        least = sum(min(stored_bits(layer, pair) for pair in pairs_of(layer)) for layer in layers.values()) / total
        raise KVError(f"no plan has {bits:g} bits an element; the smallest has {least:.3f}, with gains") from None


def within_bytes(
    layers: Layers,
    budget: int,
    bytes_of: Callable[[LayerSensitivity, tuple[int, int]], int],
    length: int | None = None,
    classes: int = CLASSES,
) -> Allocation:
    """The cheapest plan of at most `budget` bytes; bytes_of: what the cache of a layer takes in this pair."""
    try:
        return _allocate(layers, bytes_of, budget, length, classes)
    except KnapsackError:
        least = sum(min(bytes_of(layer, pair) for pair in pairs_of(layer)) for layer in layers.values())
        raise KVError(f"no plan has {budget:,} bytes; the smallest has {least:,}: give more, or less context") from None


def pairs_of(layer: LayerSensitivity) -> list[tuple[int, int]]:
    """The pairs that were measured."""
    known = next(iter(layer.errors.values()))
    return [pair for pair in PAIRS if pair == (16, 16) or name_of(pair) in known]


def _allocate(
    layers: Layers,
    size_of: Callable[[LayerSensitivity, tuple[int, int]], int],
    budget: int,
    length: int | None,
    classes: int,
) -> Allocation:
    numbers = list(layers)
    table = {
        n: {pair: (cost_of(layers[n], pair, length), size_of(layers[n], pair)) for pair in pairs_of(layers[n])}
        for n in numbers
    }

    def solved(allowed: set[tuple[int, int]]) -> tuple[Choice, list[tuple[int, int]]]:
        menus = [[pair for pair in table[n] if pair in allowed] for n in numbers]
        costs = [[table[n][pair][0] for pair in menu] for n, menu in zip(numbers, menus, strict=True)]
        sizes = [[table[n][pair][1] for pair in menu] for n, menu in zip(numbers, menus, strict=True)]
        choice = choose(costs, sizes, budget)
        return choice, [menu[j] for menu, j in zip(menus, choice.index, strict=True)]

    allowed = {pair for menu in table.values() for pair in menu}
    choice, pairs = solved(allowed)
    while len(used := set(pairs)) > classes:
        # without the class whose absence costs least, the others that are in use or not remain
        trials = []
        for pair in sorted(used):
            try:
                trials.append((*solved(used - {pair}), pair))
            except KnapsackError:
                continue  # a class that the budget needs
        if not trials:
            break
        choice, pairs, _ = min(trials, key=lambda t: t[0].cost)
    chosen = dict(zip(numbers, pairs, strict=True))
    bits = sum(stored_bits(layers[n], pair) for n, pair in chosen.items())
    return Allocation(
        pairs=chosen,
        costs={n: table[n][pair][0] for n, pair in chosen.items()},
        bits=bits / sum(elements(layer) for layer in layers.values()),
        gap=choice.gap,
    )
