"""The attention implementation "bitpalette" of transformers: reads packed caches, and dense ones as `sdpa` does.

transformers does not hand the cache to attention. What packed layers return as keys are the new tokens' own, with the
layer behind an attribute. A mask that is causal but for padding stays uint8 [batch, 1, 1, tokens], 1 where a token is
real, None where all are: uint8, because masks of transformers and of users are bool or float, and four dimensions,
because models slice masks as [:, :, queries, :] (Gemma 4). Any other mask is built as for `sdpa`, and packed layers
refuse it.
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
"""Attribute of a key tensor: the `Handle` of the tokens that a packed layer was just given."""

FIXED = -1
"""Place of the first key that a cache of fixed capacity tells transformers' masks of (`get_mask_sizes`): no token has
it, so `causal_mask` knows that the mask is for packed pages and not for a `StaticCache`."""

REFUSED = {
    "position_bias": "a position bias",
    "cu_seq_lens_q": "several sequences packed into a row (cu_seq_lens_q)",
    "cu_seq_lens_k": "several sequences packed into a row (cu_seq_lens_k)",
}
"""Arguments of attention that packed layers have no answer to."""


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
        """[batch, n, heads, Dv] over what the layer holds and its new tokens, of which query [batch, heads, n, D] are
        the last n. mask: uint8 [batch, 1, 1, tokens], or None."""


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
        options |= {"dropout": dropout, "sliding_window": sliding_window}
        return _unpacked(module, query, key, value, attention_mask, scaling, softcap, s_aux, options)
    if dropout:
        raise KVError(f"attention over a packed cache has no dropout ({dropout}); call model.eval()")
    for name, what in REFUSED.items():
        if options.get(name) is not None:
            raise KVError(f"attention over a packed cache does not know {what}; use transformers' DynamicCache")
    if attention_mask is not None and attention_mask.dtype != torch.uint8:
        raise KVError(
            f"attention over a packed cache takes causal masks with left padding, given as [batch, tokens], not "
            f"{attention_mask.dtype} {list(attention_mask.shape)}; use transformers' DynamicCache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return handle.attend(module, query, key, value, attention_mask, scale, softcap, sliding_window, s_aux), None


class _NoGradient(torch.autograd.Function):
    """The first argument as it is; the gradient of the others, which it was made from, is refused."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KVError("packed pages carry no gradients; train with use_cache=False")


def without_gradients(out: Tensor, *sources: Tensor) -> Tensor:
    """out, read from packed pages, with an error in a backward pass through it where gradients are recorded: most
    calls that record them never ask for one."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
        return _NoGradient.apply(out, *sources)
    return out


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Keys and values that no packed layer holds, as `sdpa` does it, or as `eager` where `sdpa` cannot."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    n, length = query.shape[2], key.shape[2]
    if mask is not None and mask.dtype == torch.uint8:
        mask = nn.functional.pad(mask, (0, length - mask.shape[-1]))  # a mask too short: what it does not tell is none
        mask = _causal(mask, n) if causal else mask.bool()
    elif mask is None and causal and 1 < n < length:  # `sdpa` would count the queries from the first key
        mask = _causal(torch.ones(1, 1, 1, length, dtype=torch.uint8, device=query.device), n)
    if softcap is None and sink_logits is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    if options.get("position_bias") is not None:
        raise KVError(f"attention {NAME!r} has no position bias beside a softcap or logits of sinks; use 'eager'")
    if options["dropout"]:
        raise KVError(f"attention {NAME!r} has no dropout beside a softcap or logits of sinks; use 'eager'")
    if mask is None and causal and n > 1:
        mask = _causal(torch.ones(1, 1, 1, length, dtype=torch.uint8, device=query.device), n)
    return _dense(query, key, value, mask, scaling, softcap, sink_logits).transpose(1, 2).contiguous(), None


def _causal(padding: Tensor, n: int) -> Tensor:
    """bool [batch, 1, n, length] of padding uint8 [batch, 1, 1, length]: the last n tokens are those of the queries."""
    length = padding.shape[-1]
    place = torch.arange(length, device=padding.device)
    return (place <= place[length - n :, None]) & padding.bool()


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
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score = (query @ repeat_kv(key, groups).mT).float() * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None:
        least = torch.finfo(score.dtype).min
        score = score.masked_fill(~mask, least) if mask.dtype == torch.bool else score + mask
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
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """uint8 [batch, 1, 1, kv_length], or None where nothing is padding; see the head of this file."""
    fixed = kv_offset == FIXED
    kv_offset = 0 if fixed else kv_offset
    growing = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    growing &= options.get("allow_is_causal_skip", True)
    if mask_function is not causal_mask_function or not (fixed or growing):
        if 1 < q_length < kv_length:  # no mask: `sdpa` counts queries from the first key, this file from the last
            options["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
    if attention_mask is None:
        return None
    real = attention_mask[:, :kv_length].to(torch.uint8)
    if fixed:  # what is padding stands in data that only the device knows
        real = nn.functional.pad(real, (0, kv_length - real.shape[1]))
    elif bool(real.all()) and real.shape[1] == kv_length:
        return None
    return real[:, None, None]


def register() -> None:
    """Give transformers the implementation and its masks, under NAME."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, causal_mask)
