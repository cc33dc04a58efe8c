"""The order of key channels that block floating point sorts by, from the weights of a model in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate.structure import decoder_blocks
from .kernels.linear import QuantLinear
from .quant.kv_bfp import channel_order
from .quant.kv_format import BLOCKS, KVError
from .quant.kv_plan import KVPlan

KEYS = "k_proj"
NORM = "k_norm"


def with_orders(plan: KVPlan, model: Any, layers: list[int]) -> KVPlan:
    """The plan with orders for those of `layers` that are in blocks and have none yet. KVError where a layer has no
    weight of its own for keys."""
    missing = [i for i in layers if plan.format_of(i).kind in BLOCKS and i not in plan.orders]
    if not missing:
        return plan
    return replace(plan, orders={**plan.orders, **{i: layer_order(model, i) for i in missing}})


@torch.no_grad()
def layer_order(model: Any, layer: int) -> Tensor:
    """int64 [kv_heads, head_dim]: `kv_bfp.channel_order` of one decoder layer."""
    config = model.config.get_text_config(decoder=True)
    name, block = decoder_blocks(model)[layer]
    found = {part.rpartition(".")[2]: module for part, module in block.named_modules()}
    keys, norm = found.get(KEYS), found.get(NORM)
    if not isinstance(keys, nn.Linear | QuantLinear):
        raise KVError(f"{name} has no linear layer {KEYS!r} to sort key channels by; use the kind 'token'")
    weight = keys.weight.float() if isinstance(keys, nn.Linear) else keys.dequantize()
    heads = config.num_key_value_heads
    width = weight.shape[0] // heads
    bias = None if keys.bias is None else keys.bias.float()
    scale = None if norm is None else getattr(norm, "weight", None)
    if scale is not None and scale.numel() == width:  # one norm for every head, behind the projection
        scale = scale.float().repeat(heads)
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return channel_order(weight, heads, int(width * (share or 1.0)), bias)
