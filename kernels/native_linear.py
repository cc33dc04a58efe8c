"""Kernels in native code: one call for every codec, and for layers that share an input (csrc/cpu/linear.h).

A kernel of this kind says how a weight is packed and makes the native `LinearWeight` of it. Up to MOST_TOKENS rows of x
go through its own multiplication; above that, row blocks are decoded and go through torch's matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..quant.native import DTYPES, cpu_module
from .base import Packed
from .isa import OnInstructionSet
from .rows import row_blocks

WIDE_BLOCK_ELEMENTS = 1 << 19


class NativeLinear(OnInstructionSet):
    """Base of the kernels in csrc/cpu that are `LinearWeight`s.

    A layer calls the native weight itself for up to most_tokens rows (kernels/native_call.py), and `transformed_linear`
    for more.
    """

    name: str
    most_tokens = 8

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
        if x.shape[0] > self.most_tokens:
            return self._wide_linear(x, packed, bias, transform)
        y = x.new_empty(x.shape[0], packed.shape[0])
        native_linear([self.native(packed)], self.resolve_isa(), transform, x, [bias], [y])
        return y

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        out = torch.empty(index.shape[0], packed.shape[1])
        self._decode(packed, index.contiguous(), out)
        return out

    def _decode(self, packed: Packed, index: Tensor, out: Tensor) -> None:
        self.native(packed).rows(index.data_ptr(), index.shape[0], out.data_ptr(), torch.get_num_threads())

    def _wide_linear(self, x: Tensor, packed: Packed, bias: Tensor | None, transform: Any) -> Tensor:
        z = x.float() if transform is None else transform_rows(x, transform)
        y = torch.empty(x.shape[0], packed.shape[0])
        # one buffer for all blocks, small enough for the cache: fresh pages for each cost more than decoding into them
        blocks = list(row_blocks(*packed.shape, WIDE_BLOCK_ELEMENTS))
        buffer = torch.empty(blocks[0][1], packed.shape[1])
        for start, stop in blocks:
            w = buffer[: stop - start]
            self._decode(packed, torch.arange(start, stop), w)
            torch.mm(z, w.T, out=y[:, start:stop])
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def transform_rows(x: Tensor, transform: Any) -> Tensor:
    """T x, float32, for every row of x [tokens, in] by a native `InputTransform`."""
    x = x.float().contiguous()
    y = torch.empty_like(x)
    transform.apply(x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads())
    return y


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
