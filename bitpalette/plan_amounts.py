"""How much memory and time candidates take, and what of both is spent whatever is chosen.

Weights and the KV cache share the memory under one budget: the cache of every layer is an item beside the weights, its
candidates pairs of bits with the KL divergence that `quantize plan-kv` finds for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .calibrate.allocate import Candidate, Item, Limit
from .calibrate.kv_allocate import cost_of, pairs_of
from .calibrate.structure import Weight
from .formats.kv_plan_file import StoredKVPlan
from .kernels.kv_pages import GROWTH
from .kernels.kv_rows import cache_bytes
from .kv_planning import plan_of_pairs
from .plan_budget import Budget
from .plan_latency import LatencyTable, Layer
from .plan_memory import Memory, kept_bytes, memory_of
from .quant.kv_format import KVFormat
from .quant.kv_plan import KVPlan
from .quant.scheme import Scheme

CHUNK = 512
"""Tokens by which the prompt is read where memory is planned (`prefill_chunk_size` of `generate`): all at once, a long
prompt takes more than the model."""

DTYPE = torch.bfloat16
"""Of activations, and of what stays in 16 bits."""

CACHE = "cache of layer {}"


@dataclass
class MemoryAmounts:
    """model: transformers', on any device; kv: measured by `quantize plan-kv`."""

    model: Any
    weights: Mapping[str, Weight]
    kv: StoredKVPlan
    budget: Budget

    def of_weight(self, name: str, scheme: Scheme) -> float:
        weight = self.weights[name]
        return kept_bytes(scheme, weight.shape, DTYPE, only_rows=weight.embedding and not weight.head)

    def items(self) -> list[Item]:
        """The cache of every layer that can be packed."""
        assert self.kv.calibration is not None and self.budget.context is not None
        found = []
        for number, layer in self.kv.calibration.layers.items():
            candidates = []
            for pair in pairs_of(layer):
                size = cache_bytes(
                    self.form(pair),
                    self.budget.context,
                    self.budget.batch,
                    layer.kv_heads,
                    layer.head_dim,
                    layer.head_dim_v,
                    DTYPE.itemsize,
                )
                cost = cost_of(layer, pair, self.budget.context)
                candidates.append(Candidate(pair, cost, {"memory": size * self.copies}))
            found.append(Item((CACHE.format(number),), tuple(candidates)))
        return found

    @property
    def copies(self) -> float:
        """What a byte of the cache takes with what it is copied from as it grows (plan_memory.workspace_bytes)."""
        return 1 + 1 / GROWTH + 2 / self.model.config.get_text_config(decoder=True).num_hidden_layers

    def form(self, pair: tuple[int, int]) -> KVFormat:
        exact = self.kv.plan.default
        return KVFormat(*pair, sinks=exact.sinks, window=exact.window)

    def plan(self, pairs: Mapping[int, tuple[int, int]]) -> KVPlan:
        return plan_of_pairs(pairs, self.kv.plan.default, self.kv.plan.means)

    def total(self, schemes: Mapping[str, Scheme], pairs: Mapping[int, tuple[int, int]]) -> Memory:
        """Of a whole plan."""
        assert self.budget.context is not None
        return memory_of(
            self.model, schemes, self.plan(pairs), self.budget.context, self.budget.batch, DTYPE, chunk=CHUNK
        )

    def limit(self, schemes: Mapping[str, Scheme], pairs: Mapping[int, tuple[int, int]], spent: float) -> Limit:
        """The budget, what does not depend on the choice taken from a plan that takes `spent` by its items."""
        assert self.budget.memory_bytes is not None
        return Limit("memory", self.budget.memory_bytes, self.total(schemes, pairs).total - spent, unit="bytes")


@dataclass
class LatencyAmounts:
    """Seconds of a token through each layer, measured on this machine as they are first asked for. reference: of the
    whole model, what the rest of a step is measured with."""

    config: Any
    weights: Mapping[str, Weight]
    reference: Mapping[str, Scheme]
    budget: Budget
    step: Any = field(default=lambda text: None)
    table: LatencyTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = LatencyTable(self.budget.threads, self.budget.device, step=self.step)

    def layers(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Layer]:
        """{parameter: its scheme and shape} of all that a step multiplies: not of a table that is only looked up."""
        return {
            n: (schemes.get(n), (w.shape[-2], w.shape[-1]))
            for n, w in self.weights.items()
            if (w.head or not w.embedding) and not w.router
        }

    def measure(self, wanted: Mapping[str, list[Scheme]], model_bytes: int) -> None:
        """Time everything that could be chosen, those of one shape in turn."""
        layers = self.layers({})
        every: list[Layer] = [(s, layers[n][1]) for n, schemes in wanted.items() if n in layers for s in schemes]
        every += [layer for n, layer in layers.items() if n not in wanted]
        self.times = self.table.layers(dict.fromkeys(every), model_bytes)

    def of_weight(self, name: str, scheme: Scheme) -> float:
        layers = self.layers({name: scheme})
        return self.times[layers[name]].median if name in layers else 0.0

    def limit(self, planned: Mapping[str, object]) -> Limit:
        """What every step takes beside the weights that are planned."""
        assert self.budget.tokens_per_second is not None
        reference = self.layers(self.reference)
        fixed = self.table.rest(self.config, reference).median
        fixed += sum(self.times[layer].median for n, layer in self.layers({}).items() if n not in planned)
        return Limit("seconds", 1 / self.budget.tokens_per_second, fixed, unit="seconds a token", whole=False)

    def tokens_per_second(self, schemes: Mapping[str, Scheme]) -> float:
        return self.table.tokens_per_second(self.config, self.layers(schemes), self.layers(self.reference)).median


def pairs_in(names: Mapping[str, object]) -> dict[int, tuple[int, int]]:
    """{layer: pair} of what was chosen for caches."""
    prefix = CACHE.format("")
    return {int(n.removeprefix(prefix)): pair for n, pair in names.items() if n.startswith(prefix)}  # type: ignore[misc]
