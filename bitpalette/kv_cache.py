"""transformers cache classes over packed pages.

    model.set_attn_implementation("bitpalette")
    model.generate(**inputs, past_key_values=QuantizedCache(model.config, "k4v4"))

Layers that attend to all tokens are packed (`kernels/kv_rows.py`); layers with a sliding window keep the window in 16
bits, and layers without keys keep what transformers gives them. Within one forward the new tokens are seen in 16 bits;
each is quantized once, when it leaves the window. Attention reads the pages; nothing is decoded as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import kv_attention
from .kernels.kv_group_rows import rows_class
from .kernels.kv_kernel import KVKernel, attention, choose
from .kernels.kv_rows import KVRows
from .quant.kv_format import KVError, KVFormat
from .quant.kv_plan import KVPlan

PACKED = "full_attention"
DENSE = ("sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy")
"""Layer types that are bounded in memory, or hold nothing: as transformers makes them."""

KEPT = 64
"""New tokens up to which a forward's keys stay beside the pages until the next one, so that `crop` takes them back
without a trace: longer than any speculation. More of them (a prompt) are packed at once."""

ROLLBACK = 64
"""Tokens of the ring behind the window once transformers announces rollbacks over several forwards."""


class Pending:
    """The tokens of one forward: given to the layer, read by attention, not appended yet."""

    def __init__(self, layer: PackedLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.skip: NDArray[np.int64] | None = None  # known once attention has the mask
        self.gone = False

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

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
        layer = self.layer
        if self.gone:
            raise KVError(
                f"layer {layer.index}: keys of an earlier forward, which are packed by now; this model shares keys in "
                "a way its config does not tell; use transformers' DynamicCache"
            )
        if query.shape[2] != self.tokens:
            raise KVError(
                f"layer {layer.index}: {query.shape[2]} queries for {self.tokens} new tokens; use transformers' "
                "DynamicCache"
            )
        rows = layer.rows
        self.skip = skip = layer.padding(mask)
        first = not rows.lengths.any() and not skip.any()
        short = sliding_window is not None and self.tokens > sliding_window
        if first and not short and softcap is None and sink_logits is None:  # nothing packed to read
            out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        else:
            new = (self.k, self.v)
            found = attention(layer.kernel, query, rows, new, skip, scaling, softcap, sliding_window, sink_logits)
            out = found.to(query.dtype).transpose(1, 2).contiguous()
        if self.tokens > KEPT and not layer.shared:
            layer.commit()
        return out


class PackedLayer(CacheLayerMixin):
    """One layer that attends to all tokens. rows: None before the first token."""

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
        shared: bool,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.index, self.form, self.mean, self.config, self.shared = index, form, mean, config, shared
        self.order = order
        self.rollback = 0
        self.reserved = 0
        self._rows: KVRows | None = None
        self.kernel: KVKernel | None = None
        self.pending: Pending | None = None
        self.length = 0  # tokens of the longest row, padding and pending ones included

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form})"

    @property
    def rows(self) -> KVRows:
        if self._rows is None:
            raise KVError(f"layer {self.index} of the cache has no tokens yet")
        return self._rows

    @property
    def nbytes(self) -> int:
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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, with the layer behind the keys for `kv_attention`."""
        if (name := getattr(self.config, "_attn_implementation", None)) != kv_attention.NAME:
            raise KVError(
                f"a packed cache is read by attention {kv_attention.NAME!r}, the model has {name!r}; "
                f"call model.set_attn_implementation({kv_attention.NAME!r})"
            )
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

    def padding(self, mask: Tensor | None) -> NDArray[np.int64]:
        """[batch]: how many of the pending tokens are padding. mask: bool [batch, length], None where none is."""
        assert self.pending is not None
        rows, past = self.rows, self.length - self.pending.tokens
        start = np.zeros(rows.batch, np.int64)
        if mask is not None:
            real = mask.to("cpu", torch.bool).numpy()
            start = real.shape[1] - real.sum(1)
            if real.shape != (rows.batch, self.length) or (real != (np.arange(self.length) >= start[:, None])).any():
                raise KVError(
                    f"the attention mask {list(real.shape)} is not left padding of {rows.batch} rows of {self.length} "
                    "tokens; pad on the left (tokenizer.padding_side = 'left'), or use transformers' DynamicCache"
                )
        if (rows.lengths != np.maximum(past - start, 0)).any():
            raise KVError(
                f"the cache holds {rows.lengths.tolist()} tokens, the attention mask tells of "
                f"{np.maximum(past - start, 0).tolist()}; pass the attention mask of all tokens in every forward"
            )
        return np.clip(start - past, 0, self.pending.tokens)

    def commit(self) -> None:
        """Append what is pending."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.skip is None:
            raise KVError(
                f"layer {self.index}: the model's attention never read the cache; it does not use transformers' "
                "AttentionInterface, or changes the keys on the way; use transformers' DynamicCache"
            )
        pending.gone = True
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
        raise KVError("a packed cache is not offloaded; use fewer bits, or transformers' DynamicCache with offloading")

    def prefetch(self) -> None:
        self.offload()


def _why_not(config: Any) -> str | None:
    """None where a model of this config can have a packed cache, else the reason in words."""
    if getattr(config, "is_encoder_decoder", False):
        return "caches of encoder-decoder models are not packed"
    decoder = config.get_text_config(decoder=True)
    if rank := getattr(decoder, "kv_lora_rank", None):
        return f"its cache holds latents (kv_lora_rank={rank}), not keys and values, and is not packed"
    types, _ = get_layer_types_and_kwargs(decoder)
    if strange := sorted(set(types) - {PACKED, *DENSE}):
        return f"layers of type {strange} are not packed"
    if PACKED not in types:
        return "no layer attends to all tokens, so there is nothing to pack"
    return None


class QuantizedCache(Cache):
    """A cache for `generate(past_key_values=...)` and `model(past_key_values=...)`.

    config: of the model. plan: a `KVPlan`, one `KVFormat` for all layers, or its name ("k4v4"). tokens: pages for rows
    of so many tokens are allocated at once; without it they come as they are needed. KVError where the model has
    nothing to pack or layers that cannot be.
    """

    def __init__(self, config: Any, plan: KVPlan | KVFormat | str, tokens: int = 0) -> None:
        plan = KVPlan.of(plan)
        if reason := _why_not(config):
            raise KVError(f"{type(config).__name__}: {reason}; use transformers' DynamicCache")
        decoder = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(decoder)
        packed = [i for i, kind in enumerate(types) if kind == PACKED]
        plan.check(packed)
        shared = "dummy" in types
        layers: list[Any] = [
            PackedLayer(i, plan.format_of(i), plan.means.get(i), decoder, shared, plan.orders.get(i))
            if kind == PACKED
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            for i, (kind, kwargs) in enumerate(zip(types, options, strict=True))
        ]
        super().__init__(layers=layers)
        self.plan = plan
        for layer in self.packed:
            layer.reserved = tokens

    @property
    def packed(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, by packed layers and by dense ones."""
        dense = [layer for layer in self.layers if not isinstance(layer, PackedLayer)]
        tensors = [t for layer in dense for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(layer.nbytes for layer in self.packed) + sum(t.numel() * t.element_size() for t in tensors)


kv_attention.register()
