"""One packed layer of a growing cache, and the new tokens of a forward on their way into it."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import kv_attention
from .kernels.kv_group_rows import rows_class
from .kernels.kv_kernel import KVKernel, attention, choose
from .kernels.kv_rows import KVRows
from .quant.kv_format import KVError, KVFormat

KEPT = 64
"""New tokens up to which a forward's keys stay beside the pages until the next one, so that `crop` takes them back
without a trace: longer than any speculation. More of them (a prompt) are packed at once."""

ROLLBACK = 64
"""Tokens of the ring behind the window once transformers announces rollbacks over several forwards."""

NEVER_READ = (
    "layer {}: {} of {} attentions read its new tokens; the model does not use transformers' AttentionInterface, or "
    "changes the keys on the way to it; use transformers' DynamicCache"
)
EARLIER = (
    "layer {}: keys of an earlier forward, which are packed by now; this model shares keys in a way its config does "
    "not tell; use transformers' {}"
)


def check_implementation(config: Any) -> None:
    """KVError where the model's attention is not the one that reads packed layers."""
    if (name := getattr(config, "_attn_implementation", None)) != kv_attention.NAME:
        raise KVError(
            f"a packed cache is read by attention {kv_attention.NAME!r}, the model has {name!r}; "
            f"call model.set_attn_implementation({kv_attention.NAME!r}); a model that does not take it has attention "
            "of its own: use transformers' DynamicCache for it"
        )


def check_centered(layer: int, mean: Tensor | None, softcap: float | None, sink_logits: Tensor | None) -> None:
    """KVError where scores without <q, mean> are not as good as with it: only a plain softmax does not see it."""
    if mean is not None and (softcap is not None or sink_logits is not None):
        raise KVError(
            f"layer {layer}: its attention has a soft cap or logits of sinks, under which keys cannot be centered; "
            "leave its mean out of the plan"
        )


def check_queries(layer: int, query: Tensor, tokens: int) -> Tensor:
    """query [batch, heads, n <= tokens, D] -> [batch, heads, tokens, D]. A model may compute only the last outputs of
    its last layers (Gemma 4); what stands for the others is zero, and their outputs are to be dropped."""
    if query.shape[2] > tokens:
        raise KVError(
            f"layer {layer}: {query.shape[2]} queries for {tokens} new tokens; use transformers' DynamicCache"
        )
    return nn.functional.pad(query, (0, 0, tokens - query.shape[2], 0)) if query.shape[2] < tokens else query


def padding(mask: Tensor | None, lengths: NDArray[np.int64], past: int, tokens: int) -> NDArray[np.int64]:
    """[batch]: how many of a forward's new `tokens` are padding. past: tokens before it, padding included; lengths
    [batch]: the real ones among them. mask: uint8 [batch, 1, 1, any], as `kv_attention.causal_mask` makes it."""
    batch, length = len(lengths), past + tokens
    start = np.zeros(batch, np.int64)
    if mask is not None:
        real = mask[:, 0, 0].to("cpu", torch.bool).numpy()
        start = length - real.sum(1)
        wrong = real.shape[0] != batch or real.shape[1] < length or real[:, length:].any()
        if wrong or (real[:, :length] != (np.arange(length) >= start[:, None])).any():
            raise KVError(
                f"the attention mask {list(real.shape)} is not left padding of {batch} rows of {length} tokens; pad on "
                "the left (tokenizer.padding_side = 'left'), or use transformers' DynamicCache"
            )
    if (lengths != np.maximum(past - start, 0)).any():
        raise KVError(
            f"the cache holds {lengths.tolist()} tokens, the attention mask tells of "
            f"{np.maximum(past - start, 0).tolist()}; pass the attention mask of all tokens in every forward"
        )
    return np.clip(start - past, 0, tokens)


class Pending:
    """The tokens of one forward: given to the layer, read by attention, not appended yet."""

    def __init__(self, layer: PackedLayer, k: Tensor, v: Tensor) -> None:
        self._layer, self.k, self.v = weakref.ref(layer), k, v  # weak: a cycle would keep caches until gc runs
        self.skip: NDArray[np.int64] | None = None  # known once attention has the mask
        self.reads = 0
        self.gone = False

    @property
    def layer(self) -> PackedLayer:
        layer = self._layer()
        if layer is None:
            raise KVError("keys of a cache that is gone; keep the cache while the model runs")
        return layer

    def of(self, layer: PackedLayer) -> Pending:
        """The same tokens of a copy of their layer."""
        other = copy.copy(self)
        other._layer = weakref.ref(layer)
        return other

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    @torch.compiler.disable(reason="a growing cache is not for compiled graphs: use QuantizedCache(.., static=True)")
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        layer, n = self.layer, query.shape[2]
        if self.gone:
            raise KVError(EARLIER.format(layer.index, "DynamicCache"))
        check_centered(layer.index, layer.mean, softcap, sink_logits)
        query = check_queries(layer.index, query, self.tokens)
        layer.prefetch()
        rows = layer.rows
        self.skip = skip = padding(mask, rows.lengths, layer.length - self.tokens, self.tokens)
        first = not rows.lengths.any() and not skip.any()
        short = sliding_window is not None and self.tokens > sliding_window
        if first and not short and softcap is None and sink_logits is None:  # nothing packed to read
            out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        else:
            new = (self.k, self.v)
            with torch.no_grad():
                found = attention(layer.kernel, query, rows, new, skip, scaling, softcap, sliding_window, sink_logits)
                out = found.to(query.dtype).transpose(1, 2).contiguous()
            out = kv_attention.without_gradients(out, query, key, value)
        self.reads += 1
        if self.reads == layer.readers:
            layer.read()
        return out[:, self.tokens - n :]


class PackedLayer(CacheLayerMixin):
    """One layer that attends to all tokens. readers: how many layers of the model read it, itself among them. order:
    int64 [kv_heads, D], in which blocks of some kinds of formats take the channels of keys."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        form: KVFormat,
        mean: Tensor | None,
        config: Any,
        readers: int = 1,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.index, self.form, self.mean, self.config, self.readers = index, form, mean, config, readers
        self.order = order
        self.rollback = 0
        self.reserved = 0
        self._rows: KVRows | None = None
        self.kernel: KVKernel | None = None
        self.pending: Pending | None = None
        self.length = 0  # tokens of the longest row, padding and pending ones included
        self.leaves = False  # pages go to the CPU once they are read

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form})"

    @property
    def rows(self) -> KVRows:
        """KVError before the first token."""
        if self._rows is None:
            raise KVError(f"layer {self.index} of the cache has no tokens yet")
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes allocated. Pages that forks share are counted in each."""
        pending = [] if self.pending is None else [self.pending.k, self.pending.v]
        held = 0 if self._rows is None else self._rows.nbytes
        return held + sum(t.numel() * t.element_size() for t in pending)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = batch
        width_v = value_states.shape[-1]
        if not self.form.dense:
            self.kernel = choose(self.form, width, width_v, self.device)
        order = {} if self.order is None else {"order": self.order}
        self._rows = rows_class(self.form)(
            self.form,
            batch,
            kv_heads,
            width,
            width_v,
            self.dtype,
            self.device,
            self.mean,
            self.rollback,
            self.kernel,
            **order,
        )
        self._rows.reserve(self.reserved)
        self.is_initialized = True

    @torch.compiler.disable(reason="a growing cache is not for compiled graphs: use QuantizedCache(.., static=True)")
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, with the layer behind the keys for `kv_attention`."""
        check_implementation(self.config)
        self.commit()
        if self._rows is None:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.rows.batch:
            raise KVError(
                f"layer {self.index} holds {self.rows.batch} rows, {key_states.shape[0]} came; use a new cache"
            )
        with torch.no_grad():
            self.pending = Pending(self, *self.rows.stored(key_states, value_states))
        self.length += self.pending.tokens
        keys = key_states.view_as(key_states)
        setattr(keys, kv_attention.HANDLE, self.pending)
        return keys, value_states

    def put(self, key_states: Tensor, value_states: Tensor, skip: NDArray[np.int64]) -> None:
        """Tokens that no forward of the model computed, [batch, kv_heads, n, D] as it would, into an empty layer;
        skip[b]: leading ones of a row that are padding."""
        self.lazy_initialization(key_states, value_states)
        self.rows.append(*self.rows.stored(key_states, value_states), skip)
        self.length = key_states.shape[2]

    def check_read(self) -> None:
        """KVError where the layer's own attention has not read what it was given."""
        if self.pending is not None and self.pending.reads == 0:
            raise KVError(NEVER_READ.format(self.index, 0, self.readers))

    def read(self) -> None:
        """All that read the pending tokens have done so."""
        assert self.pending is not None
        if self.pending.tokens > KEPT:
            self.commit()
        if self.leaves:
            self.leaves = False
            self.rows.pool.offload()

    def commit(self) -> None:
        """Append what is pending."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.reads != self.readers:
            raise KVError(NEVER_READ.format(self.index, pending.reads, self.readers))
        assert pending.skip is not None
        pending.gone = True
        self.prefetch()
        self.rows.append(pending.k, pending.v, pending.skip)

    def crop(self, tokens_to_remove: int) -> None:
        """tokens_to_remove: 0 or less, as for transformers' layers."""
        tokens = -tokens_to_remove
        if tokens < 0 or tokens > self.length:
            raise KVError(f"crop({tokens_to_remove}) of {self.length} tokens; say minus the number of tokens to remove")
        if tokens == 0 or self._rows is None:
            return
        pending = self.pending
        if pending is not None and pending.skip is None:
            self.commit()  # says what is wrong
        self.length -= tokens
        if pending is not None and pending.skip is not None:
            left = max(pending.tokens - tokens, 0)
            tokens -= pending.tokens - left
            pending.k, pending.v = pending.k[:, :left].clone(), pending.v[:, :left].clone()
            pending.skip = np.minimum(pending.skip, left)
        self._rows.crop(tokens)

    def activate_past_recording(self) -> None:
        """transformers will take back tokens of several forwards: keep a longer ring."""
        self.rollback = ROLLBACK
        if self._rows is not None:
            self._rows.grow_rollback(ROLLBACK)

    def reset(self) -> None:
        self._rows, self.pending, self.length, self.is_initialized = None, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._rows is None:
            return
        self.commit()
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._rows.select(indices)
        self.batch_size = self._rows.batch

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._rows is None:
            return
        self.commit()
        self._rows.repeat(repeats)
        self.batch_size = self._rows.batch

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Pages to the CPU. transformers calls it when the layer has its new tokens and before attention reads them:
        they go once they are read. Sinks, window and new tokens stay, being few."""
        if self._rows is None:
            return
        if self.pending is not None and self.pending.reads < self.readers:
            self.leaves = True
        else:
            self._rows.pool.offload()

    def prefetch(self) -> None:
        """Pages to the device of the keys, where they are not."""
        if self._rows is not None:
            self._rows.pool.fetch()

    def fork(self) -> PackedLayer:
        """A layer with the same tokens, which shares pages until one of the two writes to them."""
        other = copy.copy(self)
        if self._rows is not None:
            other._rows = self._rows.fork()
        if self.pending is not None:
            other.pending = self.pending.of(other)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        other = copy.copy(self)
        memo[id(self)] = other
        for shared in (self.config, self.kernel, self.mean):  # the model's, and without state
            memo[id(shared)] = shared
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        if other.pending is not None:
            other.pending = other.pending.of(other)
        return other
