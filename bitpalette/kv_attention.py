"""The attention implementation "bitpalette" of transformers: reads packed caches, and dense ones as `sdpa` does.

transformers does not hand the cache to attention. What `bitpalette.kv_cache` returns as keys are the new tokens' own,
with the cache layer behind an attribute. Masks stay two-dimensional, [batch, tokens], None where nothing is padding; a
mask that is not causal with padding is built as for `sdpa`, and packed layers refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .quant.kv_format import KVError

NAME = "bitpalette"
HANDLE = "bitpalette_kv"
"""Attribute of a key tensor: the tokens that a packed layer was just given (`kv_cache.Pending`)."""


class Handle(Protocol):
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
        """[batch, n, heads, Dv] over what the layer holds and the n tokens of query [batch, heads, n, D]."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [batch, heads, n, D] -> ([batch, n, heads, Dv], None)."""
    handle: Handle | None = getattr(key, HANDLE, None)
    if options.get("output_attentions"):
        raise KVError(f"attention {NAME!r} has no weights to return; use set_attn_implementation('eager') for them")
    if handle is None:
        mask, n, length = attention_mask, query.shape[2], key.shape[2]
        if mask is None and 1 < n < length:  # is_causal of torch would align the first token of both, not the last
            mask = torch.ones(1, length, dtype=torch.bool, device=query.device)
        if mask is not None and mask.ndim == 2:
            mask = _causal(mask, n, length)
        if softcap is None and s_aux is None:
            options |= {"sliding_window": sliding_window}
            return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
        return _dense(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None
    if dropout:
        raise KVError(f"attention over a packed cache has no dropout ({dropout}); call model.eval()")
    if options.get("position_bias") is not None:
        raise KVError("attention over a packed cache has no position bias; use transformers' DynamicCache")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise KVError(
            f"attention over a packed cache takes causal masks with left padding, not a mask of "
            f"{list(attention_mask.shape)}; use transformers' DynamicCache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = handle.attend(module, query, key, value, attention_mask, scale, softcap, sliding_window, s_aux)
    return out, None


def _causal(padding: Tensor, n: int, length: int) -> Tensor:
    """bool [batch, 1, n, length] of padding bool [batch, length]: the last n tokens are those of the queries."""
    place = torch.arange(length, device=padding.device)
    return (place <= place[length - n :, None]) & padding[:, None, None, :length]


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """[batch, heads, n, Dv] with what `sdpa` has not: soft caps (Gemma 2) and logits of sinks (gpt-oss)."""
    n, length, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score = (query @ repeat_kv(key, groups).mT).float() * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is None:
        mask = _causal(torch.ones(1, length, dtype=torch.bool, device=query.device), n, length)
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    if sink_logits is not None:
        column = sink_logits.float().view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        weight = torch.cat((score, column), -1).softmax(-1)[..., :-1]
    else:
        weight = score.softmax(-1)
    return weight.to(value.dtype) @ repeat_kv(value, groups)


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """bool [batch, kv_length], True where a token is real, or None where all are; see the head of this file."""
    growing = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if mask_function is not causal_mask_function or not growing:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
    if attention_mask is None or attention_mask.shape[1] < kv_length:
        return None if attention_mask is None else attention_mask
    real = attention_mask[:, :kv_length].bool()
    return None if bool(real.all()) else real


def register() -> None:
    """Give transformers the implementation and its masks, under NAME."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, causal_mask)
