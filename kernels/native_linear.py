"""Kernels in native code: one call for every codec, and for layers that share an input (csrc/cpu/linear.h).

A kernel of this kind says how a weight is packed and makes the native `LinearWeight` of it, which multiplies any number
of tokens: a few by its own loops, many piece by piece from a panel (csrc/cpu/panel_gemm.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..quant.native import DTYPES, cpu_module
from .base import Packed
from .isa import OnInstructionSet


class NativeLinear(OnInstructionSet):
    """Base of the kernels in csrc/cpu that are `LinearWeight`s."""

    name: str
    most_tokens = 8
    """Up to as many rows a layer keeps its call (kernels/native_call.py); with more its cost hardly counts."""

    def make_native(self, packed: Packed) -> Any:
        """A new `LinearWeight` over the tensors of `packed`. It keeps their addresses; `packed` keeps them alive."""
        raise NotImplementedError

    def native(self, packed: Packed) -> Any:
        """The `LinearWeight` of `packed`, made at the first call and kept there."""
        if packed.handle is None:
            packed.handle = self.make_native(packed)
        return packed.handle

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return self.transformed_linear(x, packed, bias, None)

    def transformed_linear(self, x: Tensor, packed: Packed, bias: Tensor | None, transform: Any) -> Tensor:
        """y [tokens, out] = T(x) W^T + bias for x [tokens, in]; transform: a native `InputTransform`, or None."""
        y = x.new_empty(x.shape[0], packed.shape[0])
        native_linear([self.native(packed)], self.resolve_isa(), transform, x, [bias], [y])
        return y

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        out = torch.empty(index.shape[0], packed.shape[1])
        index = index.contiguous()
        self.native(packed).rows(index.data_ptr(), index.shape[0], out.data_ptr(), torch.get_num_threads())
        return out


def native_linear(
    weights: Sequence[Any], isa: int, transform: Any, x: Tensor, bias: Sequence[Tensor | None], y: Sequence[Tensor]
) -> None:
    """y[i] [tokens, out_i] = T(x) W_i^T + bias_i, all in the dtype of x [tokens, in], by one native call.

    weights: native `LinearWeight`s. transform: a native `InputTransform`, or None.
    """
    x = x.contiguous()
    kept = [b if b is None or (b.dtype == x.dtype and b.is_contiguous()) else b.to(x.dtype).contiguous() for b in bias]
    cpu_module().linear(
        weights,
        isa,
        transform,
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        [0 if b is None else b.data_ptr() for b in kept],
        [t.data_ptr() for t in y],
        torch.get_num_threads(),
    )
