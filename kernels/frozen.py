"""A linear map by a frozen packed weight: the kernel forward, the decoded weight backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Kernel, Packed
from .rows import row_blocks

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def frozen_linear(x: Tensor, kernel: Kernel, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [..., out] = x [..., in] W^T + bias in the dtype of x; differentiable in x and bias, never in W.

    x: float32, float16 or bfloat16 on the device of the packed weight, any leading dimensions, also empty ones.
    """
    out_features, in_features = packed.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"the weight takes {in_features} features in, got an input of shape {list(x.shape)}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"activations are one of {ACTIVATION_DTYPES}, got {x.dtype}; cast the input or the model")
    z = x.reshape(-1, in_features)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _FrozenLinear.apply(z, kernel, packed)
        y = y if bias is None else y + bias.to(y.dtype)
    elif z.shape[0] == 0:
        y = z.new_empty(0, out_features)
    else:
        y = kernel.linear(z, packed, bias)
    return y.view(*x.shape[:-1], out_features)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, packed: Packed) -> Tensor:
        ctx.kernel, ctx.packed = kernel, packed
        return x.new_empty(0, packed.shape[0]) if x.shape[0] == 0 else kernel.linear(x, packed, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """grad [tokens, out] W, row block by row block, summed in float32."""
        packed: Packed = ctx.packed
        total = torch.zeros(grad.shape[0], packed.shape[1], device=grad.device)
        for start, stop in row_blocks(*packed.shape):
            rows = ctx.kernel.rows(packed, torch.arange(start, stop, device=grad.device))
            total.addmm_(grad[:, start:stop].float(), rows)
        return total.to(grad.dtype), None, None
