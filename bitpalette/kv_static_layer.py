"""One packed layer of a cache whose tensors have a fixed size: compiled graphs and CUDA graphs go through it.

Everything that changes from step to step stands in tensors, so a decode step is traced once. A forward attends to the
state and its own new tokens, then appends them; where layers share keys, after the last of them has read.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import kv_attention
from .kernels import kv_static
from .kernels.kv_kernel import REFERENCE, choose
from .kernels.kv_static import StaticState
from .kv_layer import EARLIER, NEVER_READ, ROLLBACK, check_centered, check_implementation, check_queries
from .quant.kv_format import KVError, KVFormat


class StaticNew:
    """The new tokens of one forward: k, v [batch, n, kv_heads, D] as stored."""

    def __init__(self, layer: StaticPackedLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.reads = 0

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
        layer, n, tokens = self.layer, query.shape[2], self.k.shape[1]
        if self.reads == layer.readers:
            raise KVError(EARLIER.format(layer.index, "StaticCache"))
        check_centered(layer.index, layer.mean, softcap, sink_logits)
        query = check_queries(layer.index, query, tokens)
        plain = mask is None and softcap is None and sink_logits is None
        short = sliding_window is not None and tokens > sliding_window
        if plain and not short and tokens > 1 and not torch.compiler.is_compiling() and layer.empty:
            out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        else:
            out = kv_static.attend(
                query.detach(),
                self.k,
                self.v,
                mask,
                list(layer.state),
                layer.numbers,
                layer.kernel,
                scaling,
                softcap,
                sliding_window,
                None if sink_logits is None else sink_logits.detach(),
            )
            out = kv_attention.without_gradients(out, query, key, value)
        self.reads += 1
        layer.unread = False
        if self.reads == layer.readers:
            kv_static.append(self.k, self.v, mask, list(layer.state), layer.numbers, layer.kernel)
            layer.incomplete = False
        return out[:, tokens - n :]


class StaticPackedLayer(CacheLayerMixin):
    """One layer that attends to all tokens, with room for `tokens` of every row. readers: how many layers of the model
    read it, itself among them."""

    is_sliding = False
    is_croppable = True
    is_compileable = True
    supports_early_init = True

    def __init__(self, index: int, form: KVFormat, mean: Tensor | None, config: Any, readers: int, tokens: int) -> None:
        super().__init__()
        if form.kind != "token":
            raise KVError(f"layer {index}: a static cache holds the kind 'token', not {form.kind!r}; use static=False")
        self.index, self.form, self.config, self.readers, self.tokens = index, form, config, readers, tokens
        self.mean = mean
        self.numbers = kv_static.format_numbers(form)
        self.kernel = REFERENCE
        self.rollback = 0
        self.unread = False
        self.incomplete = False
        self._state: StaticState | None = None
        self.length = torch.zeros((), dtype=torch.int64)  # tokens of the longest row, padding included

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form}, {self.tokens} tokens)"

    @property
    def state(self) -> StaticState:
        """KVError before the first token."""
        if self._state is None:
            raise KVError(f"layer {self.index} of the cache has no tokens yet")
        return self._state

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._state is None else self._state.nbytes

    @property
    def empty(self) -> bool:
        """Whether no row has a token; the host waits for the device."""
        return not bool(self.state.lengths.any())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise KVError(
                "a static cache allocates its tensors outside of compiled graphs; run the prompt through the model "
                "before it is compiled, or call the cache's early_initialization first"
            )
        batch, kv_heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = batch
        width_v = value_states.shape[-1]
        self.form.check_head_dim(width, width_v)
        if not self.form.dense:
            kernel = choose(self.form, width, width_v, self.device)
            self.kernel = REFERENCE if kernel is None else kernel.name
        if self.mean is not None:
            if tuple(self.mean.shape) != (kv_heads, width):
                raise KVError(f"layer {self.index}: a mean {list(self.mean.shape)} for keys of {[kv_heads, width]}")
            self.mean = self.mean.to(self.device, torch.float32).contiguous()
        sizes = (batch, kv_heads, width, width_v, self.dtype, self.device)
        with torch.inference_mode(False):
            self.length = self.length.to(self.device, copy=True)
            self._keep(StaticState.allocate(self.form, self.tokens, *sizes, rollback=self.rollback))
        self.is_initialized = True

    def _keep(self, state: StaticState) -> None:
        """The compiler may take the addresses of these tensors for constants."""
        self._state = state
        for t in (*state, self.length):
            torch._dynamo.mark_static_address(t)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, with the layer behind the keys for `kv_attention`."""
        check_implementation(self.config)
        if self.incomplete:
            raise KVError(NEVER_READ.format(self.index, "not all", self.readers))
        if self._state is None:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.state.batch:
            raise KVError(
                f"layer {self.index} holds {self.state.batch} rows, {key_states.shape[0]} came; use a new cache"
            )
        new = StaticNew(self, self._stored(key_states, True), self._stored(value_states, False))
        self.unread = self.incomplete = True
        self.length.add_(key_states.shape[2])
        keys = key_states.view_as(key_states)
        setattr(keys, kv_attention.HANDLE, new)
        return keys, value_states

    def _stored(self, x: Tensor, keys: bool) -> Tensor:
        x = x.detach()
        if (self.form.bits_k if keys else self.form.bits_v) == 16:
            return x.transpose(1, 2).contiguous()
        return kv_static.store(x, self.mean if keys else None, self.kernel)

    def check_read(self) -> None:
        """KVError where the layer's own attention has not read what it was given."""
        if self.unread:
            raise KVError(NEVER_READ.format(self.index, 0, self.readers))

    def crop(self, tokens_to_remove: int) -> None:
        """tokens_to_remove: 0 or less. The host waits for the device."""
        if self._state is None or tokens_to_remove == 0:
            return
        held = int(self.length)
        if tokens_to_remove > 0 or -tokens_to_remove > held:
            raise KVError(f"crop({tokens_to_remove}) of {held} tokens; say minus the number of tokens to remove")
        self.length.add_(tokens_to_remove)
        self._state.crop(self.form, -tokens_to_remove)

    def activate_past_recording(self) -> None:
        """transformers will take back tokens: keep a longer ring. A compiled graph is traced anew then."""
        if self.rollback < ROLLBACK:
            self.rollback = ROLLBACK
            if self._state is not None:
                self._keep(self._state.with_rollback(self.form, ROLLBACK))

    def reset(self) -> None:
        """No tokens; the memory stays, and so do addresses."""
        self.unread = self.incomplete = False
        self.length.zero_()
        if self._state is not None:
            self._state.reset(self.form)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """In place where the number of rows stays; else a compiled graph is traced anew."""
        if self._state is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        chosen = self._state.select(indices)
        if chosen is not self._state:
            self._keep(chosen)
            self.batch_size = chosen.batch

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._state is not None:
            self.batch_select_indices(torch.arange(self._state.batch).repeat_interleave(repeats))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens, kv_attention.FIXED

    def get_seq_length(self) -> int:
        """A tensor once there are tokens, as of transformers' static layers: an int would be part of the graph."""
        return self.length if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return self.tokens

    def offload(self) -> None:
        raise KVError("a static cache is not offloaded: its tensors stay where they are; use static=False")

    def prefetch(self) -> None:
        self.offload()

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticPackedLayer:
        other = copy.copy(self)
        memo[id(self)] = other
        for shared in (self.config, self.mean):  # the model's, and without state
            memo[id(shared)] = shared
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        if other._state is not None:
            other._keep(other._state)
        return other
