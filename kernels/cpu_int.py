"""Codec `int` on a CPU, natively: 1 to 8 bits from code planes (csrc/cpu/codes.h has the layout and its picture).

Any number of rows of x is multiplied in the form that `activation_form` says; int8 has a scale for 32 columns up to 8
rows and for 128 above that, where tokens are multiplied from a panel (csrc/cpu/panel_gemm.h).
"""

from __future__ import annotations

from typing import Any

import torch

from ..quant.bitstream import pack_bits, unpack_bits
from ..quant.codec import group_count
from ..quant.int import IntScheme
from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .activation_form import activation_form
from .base import Packed
from .code_planes import TILE_COLUMNS, by_block, by_row, pack_planes, unpack_planes
from .native_linear import NativeLinear


class CpuIntKernel(NativeLinear):
    name = "cpu_int"
    rank = 100
    canonical = False
    most_tokens = 32

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, IntScheme):
            return f"runs codec int, not {scheme.codec}"
        if scheme.progressive:
            return "needs fp16 scales of groups, not progressive ones"
        if scheme.per_input_channel:
            return "needs scales along the rows, not one for each input channel"
        if scheme.group_size % TILE_COLUMNS:
            return f"needs a group_size that is a multiple of {TILE_COLUMNS} or 0, not {scheme.group_size}"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        """codes uint8 [blocks, tiles, bits, 16, 4], scale float16 and zero_point uint8 [blocks, groups, 16]."""
        scheme, (out, n) = _int_scheme(qt.scheme), (qt.shape[0], qt.shape[1])
        if why_no_cpu_module() is None:
            self.resolve_isa()  # a forced set that is missing fails at load, not in the middle of a forward
        codes = unpack_bits(qt.fields["codes"].view(out, -1), n, scheme.bits)
        tensors = {"codes": pack_planes(codes, scheme.bits), "scale": by_block(qt.fields["scale"])}
        if not scheme.symmetric:
            groups = group_count(n, scheme.group_size)
            tensors["zero_point"] = by_block(unpack_bits(qt.fields["zero_point"], groups, scheme.bits))
        return Packed(scheme, (out, n), tensors)

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        scheme, (out, n), tensors = _int_scheme(packed.scheme), packed.shape, packed.tensors
        codes = unpack_planes(tensors["codes"], out, n, scheme.bits)
        fields = {"codes": pack_bits(codes, scheme.bits).flatten(), "scale": by_row(tensors["scale"], out)}
        if "zero_point" in tensors:
            fields["zero_point"] = pack_bits(by_row(tensors["zero_point"], out), scheme.bits)
        return QuantizedTensor(packed.scheme, packed.shape, fields)

    def make_native(self, packed: Packed) -> Any:
        t, scheme = packed.tensors, _int_scheme(packed.scheme)
        return cpu_module().int_weight(
            isa=self.resolve_isa(),
            activations=activation_form(),
            codes=t["codes"].data_ptr(),
            scale=t["scale"].data_ptr(),
            zero=t["zero_point"].data_ptr() if "zero_point" in t else 0,
            bits=scheme.bits,
            out=packed.shape[0],
            in_features=packed.shape[1],
            group_size=scheme.group_size,
        )


def _int_scheme(scheme: Scheme) -> IntScheme:
    if not isinstance(scheme, IntScheme):
        raise TypeError(f"cpu_int packs codec int, not {scheme}")
    return scheme


KERNEL = CpuIntKernel()
