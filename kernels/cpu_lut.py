"""Codec `lut` on a CPU, natively: tables of 4 to 16 entries, from code planes (csrc/cpu/codes.h has the layout).

With int8 activations the entries are rounded to bytes, with a unit a table; with exact or float32 activations they are
what the codec says, and the products are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.bitstream import pack_bits, unpack_bits
from ..quant.lut import LutScheme
from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .activation_form import activation_form
from .base import Packed
from .code_planes import BLOCK_ROWS, TILE_COLUMNS, by_block, by_row, pack_planes, unpack_planes
from .native_linear import NativeLinear

MOST_ENTRIES = 16
UNITS = 32
"""Units tried for a table, from its largest entry / 127 to 1.25 times that: the best one halves the error of the
first, since a table has few entries."""
BYTE_OF_ZERO = 128


class CpuLutKernel(NativeLinear):
    name = "cpu_lut"
    rank = 101
    canonical = False
    most_tokens = 32

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, LutScheme):
            return f"runs codec lut, not {scheme.codec}"
        if scheme.dims != 1:
            return "needs a code for each weight (dims 1), not one for two"
        if scheme.entries > MOST_ENTRIES:
            return f"needs a table of at most {MOST_ENTRIES} entries, not {scheme.entries}"
        if scheme.group_size % TILE_COLUMNS:
            return f"needs a group_size that is a multiple of {TILE_COLUMNS} or 0, not {scheme.group_size}"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        """codes uint8 [blocks, tiles, bits, 16, 4], scale float16 [blocks, groups, 16], table as the codec has it.

        table_bytes uint8 [16] and table_unit float32 [1]; with a table a row [blocks, entries / 4, 16, 4] and
        [blocks, 16]: table = (table_bytes - 128) * table_unit, about.
        """
        scheme, (out, n) = _lut_scheme(qt.scheme), (qt.shape[0], qt.shape[1])
        if why_no_cpu_module() is None:
            self.resolve_isa()  # a forced set that is missing fails at load, not in the middle of a forward
        codes = unpack_bits(qt.fields["codes"].view(out, -1), n, scheme.bits)
        table = qt.fields["table"]
        tensors = {"codes": pack_planes(codes, scheme.bits), "table": table}
        tensors["table_bytes"], tensors["table_unit"] = table_bytes(table)
        if scheme.scaled:
            tensors["scale"] = by_block(qt.fields["scale"])
        return Packed(scheme, (out, n), tensors)

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        scheme, (out, n), tensors = _lut_scheme(packed.scheme), packed.shape, packed.tensors
        codes = unpack_planes(tensors["codes"], out, n, scheme.bits)
        fields = {"codes": pack_bits(codes, scheme.bits).flatten(), "table": tensors["table"]}
        if "scale" in tensors:
            fields["scale"] = by_row(tensors["scale"], out)
        return QuantizedTensor(packed.scheme, packed.shape, fields)

    def make_native(self, packed: Packed) -> Any:
        t, scheme, form = packed.tensors, _lut_scheme(packed.scheme), activation_form()
        return cpu_module().lut_weight(
            isa=self.resolve_isa(),
            activations="int8" if form == "int8" else "float32",  # a table is exact in float32 alone
            codes=t["codes"].data_ptr(),
            scale=t["scale"].data_ptr() if "scale" in t else 0,
            table=t["table"].data_ptr(),
            table_bytes=t["table_bytes"].data_ptr(),
            table_unit=t["table_unit"].data_ptr(),
            table_by_row=scheme.table_scope == "row",
            entries=scheme.entries,
            bits=scheme.bits,
            out=packed.shape[0],
            in_features=packed.shape[1],
            group_size=scheme.group_size,
        )


def table_bytes(table: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes uint8, unit float32) of a table float16 [entries] or [out, entries], as `CpuLutKernel.prepare` has them.

    The unit is that of least squared error over the entries, of `UNITS`.
    """
    rows = table.float().view(-1, table.shape[-1])  # [tables, entries]
    least = rows.abs().amax(-1, keepdim=True) / 127
    best, error, unit = torch.zeros_like(rows), torch.full_like(least, torch.inf), torch.zeros_like(least)
    for stretch in torch.linspace(1, 1.25, UNITS).tolist():
        tried = least * stretch
        code = torch.round(rows / torch.where(tried > 0, tried, 1.0))
        wrong = (code * tried - rows).square().sum(-1, keepdim=True)
        better = wrong < error
        best, unit, error = (
            torch.where(better, new, old) for new, old in ((code, best), (tried, unit), (wrong, error))
        )
    codes = (best + BYTE_OF_ZERO).to(torch.uint8)
    if table.dim() == 1:
        padded = codes.new_full((MOST_ENTRIES,), BYTE_OF_ZERO)
        padded[: len(table)] = codes[0]
        return padded, unit.flatten()
    out, entries = table.shape
    blocks, fourths = -(-out // BLOCK_ROWS), -(-entries // 4)
    padded = codes.new_full((blocks * BLOCK_ROWS, fourths * 4), BYTE_OF_ZERO)
    padded[:out, :entries] = codes
    units = unit.new_zeros(blocks * BLOCK_ROWS)
    units[:out] = unit[:, 0]
    by_fourth = padded.view(blocks, BLOCK_ROWS, fourths, 4).transpose(1, 2).contiguous()
    return by_fourth, units.view(blocks, BLOCK_ROWS)


def _lut_scheme(scheme: Scheme) -> LutScheme:
    if not isinstance(scheme, LutScheme):
        raise TypeError(f"cpu_lut packs codec lut, not {scheme}")
    return scheme


KERNEL = CpuLutKernel()
