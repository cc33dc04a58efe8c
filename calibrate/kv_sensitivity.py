"""What fewer bits of one layer's cache do to what the layer puts out.

The relative squared error of the attention output behind its projection, E(p) = sum |Wo (o_p - o)|^2 / sum |Wo o|^2
over sampled queries, for every pair p of bits of keys and values: as a decode step sees the cache, sinks and the last
tokens exact, keys centered, both by the codec of quant/kv_token.py. KVTuner (arXiv 2502.04420) ranks pairs by such an
error; here it is multiplied by a measured slope to the model's KL divergence (bitpalette/kv_measure.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..quant.kv_format import BITS, KVError
from ..quant.kv_token import decode, encode, rotate
from .kv_allocate import name_of
from .kv_collect import Attended, capped, query_positions

OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj")
"""What transformers' attention modules call the projection of their output."""

Pair = tuple[int, int]


@dataclass
class OutputErrors:
    """An observer that adds up errors.

    layers: those that are looked at; without a mean they are not centered. pairs: candidates. sinks: numbers of exact
    first tokens to measure with (one of them, where nothing is compared). window: exact last tokens. queries: sampled
    of every sequence.
    """

    layers: frozenset[int]
    means: Mapping[int, Tensor]
    pairs: tuple[Pair, ...]
    sinks: tuple[int, ...]
    window: int
    queries: int = 64
    error: dict[tuple[int, int, int, Pair], float] = field(default_factory=dict)
    energy: dict[tuple[int, int, int], float] = field(default_factory=dict)
    widths: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def __call__(self, seen: Attended) -> None:
        if seen.layer not in self.layers:
            return
        kv_heads, n, width = seen.key.shape[1:]
        self.widths[seen.layer] = (kv_heads, width, seen.value.shape[-1])
        weight = projection(seen.module, seen.query.shape[1] * seen.value.shape[-1])
        for query, key, value in zip(seen.query.float(), seen.key.float(), seen.value.float(), strict=True):
            stored = _Stored(key, value, self.means.get(seen.layer), self.pairs)
            for sinks in self.sinks:
                at = query_positions(n, sinks + self.window + 1, self.queries).to(key.device)
                exact, quantized = outputs(seen, query, at, stored, self.pairs, sinks, self.window)
                where = (seen.layer, n, sinks)
                energy = float((exact @ weight.T).square().sum(dtype=torch.float64))
                self.energy[where] = self.energy.get(where, 0.0) + energy
                for pair, out in quantized.items():
                    error = float(((out - exact) @ weight.T).square().sum(dtype=torch.float64))
                    self.error[*where, pair] = self.error.get((*where, pair), 0.0) + error

    def relative(self, layer: int, length: int, sinks: int) -> dict[str, float]:
        """{"k4v2": E} of one layer at sequences of one length. KVError where they are not finite."""
        energy = self.energy[layer, length, sinks]
        found = {}
        for pair in self.pairs:
            error = self.error[layer, length, sinks, pair] / max(energy, 1e-30)
            if not 0 <= error < float("inf"):
                raise KVError(
                    f"layer {layer}: attention output of {name_of(pair)} is not finite ({error}); keep 16 bits"
                )
            found[name_of(pair)] = error
        return found


class _Stored:
    """Keys and values of one sequence as the cache gives them back, per width: {bits: float32 [kv_heads, n, D]}."""

    def __init__(self, key: Tensor, value: Tensor, mean: Tensor | None, pairs: Iterable[Pair]) -> None:
        shift = torch.zeros(()) if mean is None else mean[:, None].to(key.device)
        self.keys, self.values = {16: key}, {16: value}
        centered, turned = rotate(key - shift), rotate(value)
        for bits in {keys for keys, _ in pairs} - {16}:
            self.keys[bits] = rotate(decode(*encode(centered, bits, True), bits)) + shift
        for bits in {values for _, values in pairs} - {16}:
            self.values[bits] = rotate(decode(*encode(turned, bits, False), bits))


def outputs(
    seen: Attended, query: Tensor, at: Tensor, stored: _Stored, pairs: Iterable[Pair], sinks: int, window: int
) -> tuple[Tensor, dict[Pair, Tensor]]:
    """(attention output [queries, heads * Dv] from exact keys and values, {pair: from what the cache holds}).

    query [heads, n, D] of one sequence; at: the tokens whose queries are taken. A query at token t sees sinks and
    tokens t - window .. t exactly, as when tokens come one by one.
    """
    key, value = stored.keys[16], stored.values[16]
    kv_heads, n, _ = key.shape
    token = torch.arange(n, device=at.device)
    hidden = token > at[:, None]  # [queries, n]
    if seen.sliding_window is not None:
        hidden |= token <= at[:, None] - seen.sliding_window
    packed = (token >= sinks) & (token < at[:, None] - window)
    q = query[:, at].unflatten(0, (kv_heads, -1))  # [kv_heads, group, queries, D]
    found: dict[Pair, list[Tensor]] = {pair: [] for pair in ((16, 16), *pairs)}
    for head in range(kv_heads):
        exact_score = _score(q[head], key[head], seen)
        for bits in dict.fromkeys(keys for keys, _ in found):
            score = exact_score
            if bits != 16:
                score = torch.where(packed, _score(q[head], stored.keys[bits][head], seen), exact_score)
            weight = _softmax(score.masked_fill(hidden, -torch.inf), seen.sink_logits, head, len(q[head]))
            base = weight @ value[head]
            of_values = [v for k, v in found if k == bits]
            errors = torch.cat([stored.values[v][head] - value[head] for v in of_values], -1)
            differences = ((weight * packed) @ errors).chunk(len(of_values), -1)
            for v, difference in zip(of_values, differences, strict=True):
                found[bits, v].append(base + difference)
    joined = {pair: torch.cat(parts).transpose(0, 1).flatten(1) for pair, parts in found.items()}
    return joined[16, 16], {pair: joined[pair] for pair in pairs}


def _score(q: Tensor, key: Tensor, seen: Attended) -> Tensor:
    """[group, queries, n]."""
    return capped(q @ key.mT * seen.scaling, seen.softcap)


def _softmax(score: Tensor, sink_logits: Tensor | None, head: int, group: int) -> Tensor:
    if sink_logits is None:
        return score.softmax(-1)
    logit = sink_logits.float().view(-1, group)[head][:, None, None].expand(*score.shape[:-1], 1)
    return torch.cat((score, logit), -1).softmax(-1)[..., :-1]


def projection(module: nn.Module, width: int) -> Tensor:
    """The matrix float32 [out, heads * Dv] that the layer's attention output goes through. KVError where none is
    found. Any linear module serves: the matrix is what it makes of the unit vectors."""
    for name in OUTPUT_NAMES:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            parameter = next(child.parameters(), None)
            dtype = torch.float32 if parameter is None else parameter.dtype
            device = "cpu" if parameter is None else parameter.device
            unit = torch.eye(width, dtype=dtype, device=device)
            with torch.no_grad():
                return (child(unit) - child(torch.zeros_like(unit[:1]))).float().T.contiguous()
    raise KVError(
        f"{type(module).__name__} has no projection of its output named one of {list(OUTPUT_NAMES)}; its cache cannot "
        "be planned, use one format for all layers"
    )


def candidate_pairs(head_dim: int, head_dim_v: int) -> tuple[Pair, ...]:
    """All pairs but (16, 16) whose rows are whole bytes."""
    keys = [bits for bits in BITS if bits == 16 or head_dim % 8 == 0]
    values = [bits for bits in BITS if bits == 16 or head_dim_v % 8 == 0]
    return tuple((k, v) for k in keys for v in values if (k, v) != (16, 16))
