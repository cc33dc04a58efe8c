"""transformers cache classes over packed pages.

    model.set_attn_implementation("bitpalette")
    model.generate(**inputs, past_key_values=QuantizedCache(model.config, "k4v4"))

Layers that attend to all tokens are packed; layers with a sliding window keep the window in 16 bits, and layers without
keys keep what transformers gives them. Within one forward the new tokens are seen in 16 bits; each is quantized once,
when it leaves the window. Attention reads the pages; nothing is decoded as a whole. `static=True`: tensors of fixed
size, for torch.compile and CUDA graphs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from . import kv_attention
from .kv_layer import PackedLayer
from .kv_static_layer import StaticPackedLayer
from .quant.kv_format import KVError, KVFormat
from .quant.kv_plan import KVPlan

PACKED = "full_attention"
DENSE = ("sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy")
"""Layer types that are bounded in memory, or hold nothing: as transformers makes them."""


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


def _readers(config: Any, types: list[str]) -> dict[int, int]:
    """{layer with keys of its own: how many layers read them}. Where a model shares keys, a layer without reads those
    of the last layer of its type that has some (Gemma 3n, Gemma 4)."""
    kinds = getattr(config, "layer_types", None) or [PACKED] * len(types)
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    readers = {i: 1 for i, mode in enumerate(modes) if mode != "reuse"}
    for i, mode in enumerate(modes):
        if mode == "reuse":
            readers[max(j for j in readers if modes[j] == "store" and kinds[j] == kinds[i])] += 1
    return readers


class QuantizedCache(Cache):
    """A cache for `generate(past_key_values=...)` and `model(past_key_values=...)`.

    config: of the model. plan: a `KVPlan`, one `KVFormat` for all layers, or its name ("k4v4"). tokens: pages for rows
    of so many tokens are allocated at once; without it they come as they are needed. static: all tensors have their
    size from the first forward on, for `tokens` tokens a row, padding among them: for torch.compile and CUDA graphs.
    offloading: the pages of a layer are on its GPU while it needs them and on the CPU otherwise, as in transformers'
    own caches; offload_only_non_sliding: layers with a sliding window stay. KVError where the model has nothing to pack
    or layers that cannot be.
    """

    def __init__(
        self,
        config: Any,
        plan: KVPlan | KVFormat | str,
        tokens: int = 0,
        *,
        static: bool = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        plan = KVPlan.of(plan)
        if reason := _why_not(config):
            raise KVError(f"{type(config).__name__}: {reason}; use transformers' DynamicCache")
        if offloading and static:
            raise KVError("a static cache is not offloaded: its tensors stay where they are; leave one of the two out")
        if offloading and not torch.cuda.is_available():
            raise KVError("offloading takes pages from a GPU to the CPU, and there is no GPU; leave offloading out")
        if static and tokens < 1:
            raise KVError(f"a static cache needs to know its most tokens a row, tokens={tokens}; say tokens=4096")
        decoder = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(decoder)
        packed = [i for i, kind in enumerate(types) if kind == PACKED]
        plan.check(packed)
        readers = _readers(decoder, types)
        layers: list[Any] = []
        for i, (kind, kwargs) in enumerate(zip(types, options, strict=True)):
            form, mean = plan.format_of(i), plan.means.get(i)
            if kind != PACKED:
                layers.append(
                    STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=tokens, **kwargs)
                    if static
                    else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
                )
            elif static:
                layers.append(StaticPackedLayer(i, form, mean, decoder, readers[i], tokens))
            else:
                layers.append(PackedLayer(i, form, mean, decoder, readers[i], plan.orders.get(i)))
                layers[-1].reserved = tokens
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.plan = plan

    @property
    def packed(self) -> list[PackedLayer]:
        """The packed layers; none of a static cache, whose layers are of another class."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, by packed layers and by dense ones. Pages that forks share are counted in each."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, (PackedLayer, StaticPackedLayer)):
                total += layer.nbytes
            else:
                tensors = [t for t in vars(layer).values() if isinstance(t, Tensor)]
                total += sum(t.numel() * t.element_size() for t in tensors)
        return total

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers calls it; KVError where the attention of an earlier layer did not read its packed keys."""
        for layer in self.layers[max(layer_idx - 1, 0) : layer_idx]:
            if isinstance(layer, (PackedLayer, StaticPackedLayer)):
                layer.check_read()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fork(self) -> QuantizedCache:
        """A cache with the same tokens to go on from, for several continuations of one prompt: pages are shared until
        one of the two writes to them, so that it costs the window. `copy.deepcopy` shares nothing."""
        if any(isinstance(layer, StaticPackedLayer) for layer in self.layers):
            raise KVError("a static cache shares no pages; use copy.deepcopy")
        other = copy.copy(self)
        other.layers = [
            layer.fork() if isinstance(layer, PackedLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return other


kv_attention.register()
