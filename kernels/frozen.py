"""A linear map by a frozen packed weight: the kernel forward, the decoded weight backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Kernel, Packed, TransformingKernel
from .input_transform import InputTransforms
from .native_linear import NativeLinear
from .rows import row_blocks

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def frozen_linear(
    x: Tensor, kernel: Kernel, packed: Packed, transforms: InputTransforms | None, bias: Tensor | None
) -> Tensor:
    """y [..., out] = T(x) [..., in] W^T + bias in the dtype of x; differentiable in x and bias, never in W.

    x: float32, float16 or bfloat16 on the device of the packed weight, any leading dimensions, also empty ones.
    """
    out_features, in_features = packed.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"the weight takes {in_features} features in, got an input of shape {list(x.shape)}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"activations are one of {ACTIVATION_DTYPES}, got {x.dtype}; cast the input or the model")
    z = x.reshape(-1, in_features)
    graph = torch.is_grad_enabled()
    if graph and x.requires_grad:
        y = _FrozenLinear.apply(z, kernel, packed, transforms)
        y = y if bias is None else y + bias.to(y.dtype)
    elif graph and bias is not None and bias.requires_grad:
        y = _forward(z, kernel, packed, None, transforms) + bias.to(x.dtype)
    else:
        y = _forward(z, kernel, packed, bias, transforms)
    return y.view(*x.shape[:-1], out_features)


def input_gradient(grad: Tensor, kernel: Kernel, packed: Packed, transforms: InputTransforms | None) -> Tensor:
    """T^T W^T grad, [tokens, in] in the dtype of grad [tokens, out]: row block by row block, summed in float32."""
    total = torch.zeros(grad.shape[0], packed.shape[1], device=grad.device)
    for start, stop in row_blocks(*packed.shape):
        rows = kernel.rows(packed, torch.arange(start, stop, device=grad.device))
        total.addmm_(grad[:, start:stop].float(), rows)
    return (total if transforms is None else transforms.transpose(total)).to(grad.dtype)


def _forward(
    x: Tensor, kernel: Kernel, packed: Packed, bias: Tensor | None, transforms: InputTransforms | None
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, packed.shape[0])
    if transforms is None:
        return kernel.linear(x, packed, bias)
    if transforms.native is not None and isinstance(kernel, NativeLinear | TransformingKernel):
        return kernel.transformed_linear(x, packed, bias, transforms.native)
    return kernel.linear(transforms.apply(x), packed, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, packed: Packed, transforms: InputTransforms | None) -> Tensor:
        ctx.map = kernel, packed, transforms
        return _forward(x, kernel, packed, None, transforms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return input_gradient(grad, *ctx.map), None, None, None
