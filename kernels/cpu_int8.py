"""Codec `int` at 8 bits, symmetric, a scale a row, on a CPU, natively from the canonical layout (csrc/cpu/int8.h).

The layout of embeddings and heads: rows are looked up and multiplied from the same bytes. Up to MOST_TOKENS rows of x
are multiplied natively in float32; above that row blocks are decoded and go through torch's matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.int import IntScheme
from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from .base import Packed
from .isa import OnInstructionSet
from .reference import ReferenceKernel

MOST_TOKENS = 8


class CpuInt8Kernel(OnInstructionSet, ReferenceKernel):
    """As the reference, which holds the canonical fields and decodes rows, but for few tokens."""

    name = "cpu_int8"
    rank = 110
    canonical = True

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, IntScheme) or scheme.bits != 8 or not scheme.symmetric:
            return f"runs codec int at 8 bits, symmetric, not {scheme}"
        if scheme.group_size or scheme.per_input_channel:
            return "needs one scale a row (group_size 0)"
        return why_no_cpu_module()

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        if x.shape[0] > MOST_TOKENS:
            return super().linear(x, packed, bias)
        if packed.handle is None:
            packed.handle = packed.tensors["scale"].float().flatten()
        z = x.float().contiguous()
        y = torch.empty(z.shape[0], packed.shape[0])
        codes, scale = packed.tensors["codes"], packed.handle
        cpu_module().int8_linear(
            self.resolve_isa(),
            codes.data_ptr(),
            scale.data_ptr(),
            *packed.shape,
            z.data_ptr(),
            z.shape[0],
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return (y if bias is None else y.add_(bias)).to(x.dtype)


KERNEL = CpuInt8Kernel()
