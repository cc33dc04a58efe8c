"""The KL divergence of a model that reads a packed cache, measured fast: one forward over a whole sequence, in which
the attention of packed layers goes through the pages chunk by chunk.

A layer sees exactly what it would see if the model ran in chunks of `STEP` tokens with a `QuantizedCache`: the tokens
of a chunk in 16 bits, those before it as the cache holds them. Everything else runs over all tokens at once. Where
only one layer is packed, the blocks before it are not run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calibrate.kv_collect import Attended, observing
from .calibrate.stream import Recorder
from .calibrate.structure import decoder_blocks
from .kernels.kv_kernel import attention, choose
from .kernels.kv_rows import KVRows
from .kv_attention import NAME
from .quant.kv_format import KVError
from .quant.kv_plan import KVPlan

STEP = 64
"""Tokens of a chunk."""


class PackedRead:
    """An observer: attention of packed layers through pages, in chunks of `step` tokens."""

    def __init__(self, plan: KVPlan, layers: Sequence[int], step: int = STEP) -> None:
        self.plan, self.layers, self.step = plan, frozenset(layers), step
        self.owners: dict[int, tuple[Tensor, int]] = {}  # by the address of their keys, kept so that it stays theirs

    def __call__(self, seen: Attended) -> Tensor | None:
        if seen.layer in self.layers:
            owner = seen.layer
            self.owners[seen.key.data_ptr()] = (seen.key, owner)
        elif (known := self.owners.get(seen.key.data_ptr())) is not None:  # a layer that shares another's keys
            owner = known[1]
        else:
            return None
        form = self.plan.format_of(owner)
        return None if form.dense else self._read(seen, owner)

    def _read(self, seen: Attended, owner: int) -> Tensor:
        batch, kv_heads, n, width = seen.key.shape
        width_v, device = seen.value.shape[-1], seen.key.device
        form = self.plan.format_of(owner)
        kernel = choose(form, width, width_v, device)
        mean = self.plan.means.get(owner)
        rows = KVRows(form, batch, kv_heads, width, width_v, seen.key.dtype, device, mean, 0, kernel)
        rows.reserve(n)
        skip = np.zeros(batch, np.int64)
        parts = []
        for start in range(0, n, self.step):
            chunk = slice(start, start + self.step)
            new = rows.stored(seen.key[:, :, chunk], seen.value[:, :, chunk])
            query = seen.query[:, :, chunk]
            out = attention(
                kernel, query, rows, new, skip, seen.scaling, seen.softcap, seen.sliding_window, seen.sink_logits
            )
            parts.append(out.to(seen.query.dtype))
            rows.append(*new, skip)
        return torch.cat(parts, 2).transpose(1, 2).contiguous()


class KLMeasure:
    """measure(plan): mean KL(model || model with this plan's cache), nats a token, over tokens int64 [sequences, n]
    from `first` on: those that read packed ones.

    The model's own log probabilities are kept, float32 [sequences * (n - first), vocabulary], and the input of every
    block. layers: those that can be packed.
    """

    def __init__(self, model: Any, tokens: Tensor, layers: Sequence[int], first: int, step: int = STEP) -> None:
        if not 0 <= first < tokens.shape[1]:
            raise KVError(f"sequences of {tokens.shape[1]} tokens read nothing packed; give more than {first}")
        self.model, self.tokens, self.layers, self.first, self.step = model, tokens, list(layers), first, step
        self.blocks = decoder_blocks(model)
        self.skips = len(self.blocks) == model.config.get_text_config(decoder=True).num_hidden_layers
        self.inputs: list[dict[int, Tensor]] = []
        self.tuples: dict[int, bool] = {}
        self.reference = []
        for row in tokens:
            with self._recording():
                self.reference.append(self._log_probabilities(row))

    @torch.no_grad()
    def __call__(self, plan: KVPlan) -> float:
        first = min((layer for layer in self.layers if not plan.format_of(layer).dense), default=None)
        if first is None:
            return 0.0
        total = 0.0
        for i, (row, log_p) in enumerate(zip(self.tokens, self.reference, strict=True)):
            with self._starting_at(first, i), observing(self.model, PackedRead(plan, self.layers, self.step), NAME):
                log_q = self._log_probabilities(row)
            for p, q in zip(log_p.split(64), log_q.split(64), strict=True):
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return max(total / (len(self.tokens) * (self.tokens.shape[1] - self.first)), 0.0)

    @torch.no_grad()
    def _log_probabilities(self, row: Tensor) -> Tensor:
        logits = self.model(input_ids=row[None].to(self.model.device), use_cache=False).logits[0, self.first :]
        return logits.float().log_softmax(-1)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep the input of every block."""
        kept: dict[int, Tensor] = {}

        def hook(index: int) -> Callable[..., None]:
            def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                kept[index] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

            return before

        def returned(index: int) -> Callable[..., None]:
            def after(module: Any, args: tuple[Any, ...], out: Any) -> None:
                self.tuples[index] = isinstance(out, tuple)

            return after

        handles = []
        if self.skips:
            for i, (_, block) in enumerate(self.blocks):
                handles.append(block.register_forward_pre_hook(hook(i), with_kwargs=True))
                handles.append(block.register_forward_hook(returned(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.append(kept)

    @contextlib.contextmanager
    def _starting_at(self, layer: int, sequence: int) -> Iterator[None]:
        """The blocks before `layer` pass on what they did in the reference."""
        if not self.skips or layer == 0:
            yield
            return
        try:
            for i, (name, block) in enumerate(self.blocks[:layer]):
                stand_in = Recorder(block, False, self.tuples[i])
                stand_in.replacement = self.inputs[sequence][i + 1]
                self.model.set_submodule(name, stand_in)
            yield
        finally:
            for name, block in self.blocks[:layer]:
                self.model.set_submodule(name, block)
