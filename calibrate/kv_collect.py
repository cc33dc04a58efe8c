"""Queries, keys and values of every attention layer while calibration text runs through a model.

The model is told to use an attention of this module, which hands what every layer attends with to an observer and then
goes on as before. Nothing is kept from one layer to the next: memory is that of one layer of one sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..quant.kv_format import KVError

NAME = "bitpalette_observed"
MOST_SINKS = 16
"""First tokens that may be sinks. Their keys, often far from all others, do not count for the means."""


@dataclass(frozen=True)
class Attended:
    """What one layer attends with: query [batch, heads, n, D], key, value [batch, kv_heads, n, D], after rotary
    embedding; every token sees itself and those before it."""

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    sliding_window: int | None
    sink_logits: Tensor | None


Observer = Callable[[Attended], Tensor | None]
"""May return what the layer shall put out instead, [batch, n, heads, Dv]."""

_observer: ContextVar[tuple[Observer, str] | None] = ContextVar("bitpalette_observer", default=None)


@contextlib.contextmanager
def observing(model: Any, observer: Observer, attention: str = "sdpa") -> Iterator[None]:
    """Hand every attention of the model to `observer` while the context lasts. attention: transformers' name of what
    computes the outputs and says what masks look like."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _observed)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    model.set_attn_implementation(NAME)
    token = _observer.set((observer, attention))
    try:
        yield
    finally:
        _observer.reset(token)
        model.set_attn_implementation(before)


def _observed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    current = _observer.get()
    layer = getattr(module, "layer_idx", None)
    if current is None or not isinstance(layer, int):
        raise KVError(f"{type(module).__name__} does not say which layer it is; its cache cannot be planned")
    observer, attention = current
    scaling = options.get("scaling")
    seen = Attended(
        layer=layer,
        module=module,
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        sliding_window=options.get("sliding_window"),
        sink_logits=options.get("s_aux"),
    )
    out = observer(seen)
    if out is not None:
        return out, None
    return ALL_ATTENTION_FUNCTIONS[attention](module, query, key, value, attention_mask, **options)


@dataclass
class KeyStatistics:
    """An observer: means of keys, and how much attention the first tokens get. layers: those that are looked at.

    absolute: layers whose softmax sees more than differences of scores (a soft cap, a logit of sinks). Taking a mean
    from all keys of a row shifts its scores, so these have none.
    """

    layers: frozenset[int]
    queries: int = 64
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    absolute: set[int] = field(default_factory=set)
    mass: Tensor = field(default_factory=lambda: torch.zeros(MOST_SINKS, dtype=torch.float64))
    rows: int = 0

    def __call__(self, seen: Attended) -> None:
        if seen.layer not in self.layers:
            return
        key = seen.key[:, :, MOST_SINKS:].double()
        total = key.sum((0, 2))
        self.sums[seen.layer] = self.sums[seen.layer] + total if seen.layer in self.sums else total
        if seen.softcap is not None or seen.sink_logits is not None:
            self.absolute.add(seen.layer)
        self.shapes[seen.layer] = (seen.key.shape[-1], seen.value.shape[-1])
        self.counts[seen.layer] = self.counts.get(seen.layer, 0) + key.shape[0] * key.shape[2]
        n = seen.key.shape[2]
        at = query_positions(n, MOST_SINKS, self.queries)
        token = torch.arange(n, device=at.device)
        for query, key in zip(seen.query, seen.key, strict=True):
            q = query[:, at].float().unflatten(0, (key.shape[0], -1))  # [kv_heads, group, queries, D]
            score = capped(q @ key.float()[:, None].mT * seen.scaling, seen.softcap)
            weight = score.masked_fill(token > at[:, None], -torch.inf).softmax(-1)
            self.mass += weight.mean((0, 1, 2))[:MOST_SINKS].double().cpu()
            self.rows += 1

    def means(self) -> dict[int, Tensor]:
        """{layer: float32 [kv_heads, D]} of the layers that are not `absolute`."""
        centered = sorted(self.sums.keys() - self.absolute)
        return {layer: (self.sums[layer] / max(self.counts[layer], 1)).float() for layer in centered}

    def widths(self) -> dict[int, tuple[int, int]]:
        """{layer: (head_dim of keys, of values)}."""
        return dict(sorted(self.shapes.items()))

    def sink_mass(self) -> list[float]:
        """Share of attention on each of the first tokens, mean over layers, heads and queries."""
        return (self.mass / max(self.rows, 1)).tolist()


def query_positions(n: int, first: int, count: int) -> Tensor:
    """At most `count` of the tokens first..n-1, evenly spread, the last among them: int64."""
    first = min(first, n - 1)
    count = min(count, n - first)
    return n - 1 - torch.arange(count).flip(0) * (n - first) // count


def capped(score: Tensor, softcap: float | None) -> Tensor:
    return score if softcap is None else softcap * torch.tanh(score / softcap)


@torch.no_grad()
def run(model: Any, tokens: Mapping[int, Tensor], step: Callable[[], None] = lambda: None) -> None:
    """All sequences through the model, one at a time: tokens {length: int64 [sequences, length]}."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    for sequences in tokens.values():
        for row in sequences:
            inner(input_ids=row[None].to(model.device), use_cache=False)  # the head is of no use here
            step()
