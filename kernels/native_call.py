"""Calls of native weights with as little Python as there can be.

Most of what a call needs is the same as at the call before: a decode step asks for the same shape again and again. It
is worked out once, as a `NativeCall`, which holds as long as inputs have its shape and dtype and the layer has the
tensors it was made for. All else (gradients, wide inputs, offloaded weights, other kernels) is for kernels/frozen.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quant.native import DTYPES, cpu_module
from .base import Packed
from .native_linear import NativeLinear

Watched = tuple[Mapping[str, Tensor | None], str, Tensor | None]
"""(a module's buffers or parameters, a name, what was there): what is made for that tensor is stale without it."""


class NativeWeight(NamedTuple):
    """What a layer computes with."""

    kernel: NativeLinear
    packed: Packed
    transform: Any  # a native InputTransform, or None
    watched: tuple[Watched, ...]
    bias: Tensor | None

    def why_not(self, x: Tensor) -> str | None:
        """None where the native call takes x [..., in] and the bias as they are, by their addresses."""
        if type(x) is not Tensor or not x.is_cpu or x.dtype not in DTYPES or not x.is_contiguous():
            return f"the input is {x.dtype}, on {x.device}, strides {x.stride()}"
        if x.shape[-1] != self.packed.shape[1]:
            return f"the weight takes {self.packed.shape[1]} features in, got an input of shape {list(x.shape)}"
        if not 0 < x.numel() <= self.kernel.most_tokens * self.packed.shape[1]:
            return f"{self.kernel.name} multiplies 1 to {self.kernel.most_tokens} tokens, the input is {list(x.shape)}"
        b = self.bias
        if b is not None and not (b.dtype == x.dtype and b.is_cpu and b.is_contiguous()):
            return f"the bias is {b.dtype}, on {b.device}, strides {b.stride()}"
        return None


class NativeCall(NamedTuple):
    shape: torch.Size  # of x
    dtype: torch.dtype
    number: int  # of the dtype, for csrc
    tokens: int
    run: Callable[..., None]  # LinearCall.run
    like: Tensor  # of the output's shape: torch makes a tensor fastest in the likeness of another
    watched: tuple[Watched, ...]
    bias: Tensor | None
    bias_at: int  # its address, 0 without one: while it stays, so do the bias's dtype and strides
    packed: Packed  # kept alive: the native weight has addresses of its tensors


def native_call(weight: NativeWeight, x: Tensor) -> NativeCall | None:
    """The call for inputs like x; None where x, or the bias with it, is not for native calls."""
    if weight.why_not(x) is not None:
        return None
    out_features, in_features = weight.packed.shape
    native = weight.kernel.native(weight.packed)
    run = cpu_module().LinearCall([native], weight.kernel.resolve_isa(), weight.transform).run
    at = 0 if weight.bias is None else weight.bias.data_ptr()
    like, tokens = like_of((*x.shape[:-1], out_features), x.dtype), x.numel() // in_features
    number = DTYPES[x.dtype]
    return NativeCall(x.shape, x.dtype, number, tokens, run, like, weight.watched, weight.bias, at, weight.packed)


def are_there(watched: tuple[Watched, ...]) -> bool:
    """Whether every tensor is still in its place."""
    for tensors, name, tensor in watched:  # noqa: SIM110 - `all` of a generator takes twice as long
        if tensors.get(name) is not tensor:
            return False
    return True


@lru_cache(maxsize=256)
def like_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape on the CPU, for `torch.empty_like`."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")
