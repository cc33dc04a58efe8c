"""Codec `int` at 8 bits, symmetric, a scale a row, on a CPU, natively from the canonical layout (csrc/cpu/int8.h).

The layout of embeddings and heads: rows are looked up and multiplied from the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..quant.int import IntScheme
from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .activation_form import activation_form
from .base import Packed
from .native_linear import NativeLinear


class CpuInt8Kernel(NativeLinear):
    name = "cpu_int8"
    rank = 90
    canonical = True
    most_tokens = 32

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, IntScheme) or scheme.bits != 8 or not scheme.symmetric:
            return f"runs codec int at 8 bits, symmetric, not {scheme}"
        if scheme.group_size or scheme.per_input_channel:
            return "needs one scale a row (group_size 0)"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        return Packed(qt.scheme, (qt.shape[0], qt.shape[1]), {name: qt.fields[name] for name in ("codes", "scale")})

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return QuantizedTensor(packed.scheme, packed.shape, dict(packed.tensors))

    def make_native(self, packed: Packed) -> Any:
        return cpu_module().int8_weight(
            isa=self.resolve_isa(),
            activations=activation_form(),
            codes=packed.tensors["codes"].data_ptr(),
            scale=packed.tensors["scale"].data_ptr(),
            out=packed.shape[0],
            in_features=packed.shape[1],
        )


KERNEL = CpuInt8Kernel()
