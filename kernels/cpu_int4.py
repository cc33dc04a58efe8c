"""Codec `int` at 4 bits on a CPU, in native code (csrc/cpu/int4.h has the layout and its picture).

Up to MOST_TOKENS rows of x are quantized to int8, 32 columns to a scale, and multiplied in integers; above that the
weight is decoded row block by row block, exactly, and multiplied in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.bitstream import pack_bits, unpack_bits
from ..quant.codec import group_count
from ..quant.int import IntScheme
from ..quant.native import DTYPES, cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .base import Packed
from .isa import OnInstructionSet
from .rows import row_blocks

BLOCK_ROWS, TILE_COLUMNS = 16, 32
MOST_TOKENS = 32
"""Integers are faster at any count with AVX-512 VNNI (2.4 times at 64 tokens, one thread); above this it is a prefill
or an evaluation, which gets exact products."""
WIDE_BLOCK_ELEMENTS = 1 << 19


class CpuInt4Kernel(OnInstructionSet):
    name = "cpu_int4"
    rank = 100
    canonical = False

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, IntScheme) or scheme.bits != 4:
            return f"runs codec int at 4 bits, not {scheme}"
        if scheme.per_input_channel:
            return "needs scales along the rows, not one for each input channel"
        if scheme.group_size % TILE_COLUMNS:
            return f"needs a group_size that is a multiple of {TILE_COLUMNS} or 0, not {scheme.group_size}"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        scheme, (out, n) = _int_scheme(qt.scheme), (qt.shape[0], qt.shape[1])
        if why_no_cpu_module() is None:
            self.resolve_isa()  # a forced set that is missing fails at load, not in the middle of a forward
        blocks, tiles, groups = -(-out // BLOCK_ROWS), -(-n // TILE_COLUMNS), group_count(n, scheme.group_size)
        codes = torch.zeros(blocks * BLOCK_ROWS, tiles * TILE_COLUMNS, dtype=torch.uint8)
        codes[:out, :n] = unpack_bits(qt.fields["codes"].view(out, -1), n, 4)
        # [block, row, tile, step, half, 4] -> [block, tile, step, row, 4], the two halves in the nibbles of a byte
        parts = codes.view(blocks, BLOCK_ROWS, tiles, 4, 2, 4).permute(4, 0, 2, 3, 1, 5)
        tensors = {
            "codes": (parts[0] | parts[1] << 4).contiguous(),
            "scale": _by_block(qt.fields["scale"], blocks),
        }
        if not scheme.symmetric:
            tensors["zero_point"] = _by_block(unpack_bits(qt.fields["zero_point"], groups, 4), blocks)
        return Packed(scheme, (out, n), tensors)

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        out, n = packed.shape
        both = packed.tensors["codes"]  # [blocks, tiles, 4, 16, 4]
        parts = torch.stack((both & 15, both >> 4)).permute(1, 4, 2, 3, 0, 5)
        codes = parts.reshape(both.shape[0] * BLOCK_ROWS, -1)[:out, :n]
        fields = {"codes": pack_bits(codes, 4).flatten(), "scale": _by_row(packed.tensors["scale"], out)}
        if "zero_point" in packed.tensors:
            fields["zero_point"] = pack_bits(_by_row(packed.tensors["zero_point"], out), 4)
        return QuantizedTensor(packed.scheme, packed.shape, fields)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        if x.shape[0] > MOST_TOKENS:
            return self._wide_linear(x, packed, bias)
        x = x.contiguous()
        if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
            bias = bias.to(x.dtype).contiguous()
        y = x.new_empty(x.shape[0], packed.shape[0])
        self._layer(packed).linear(
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            DTYPES[x.dtype],
            x.shape[0],
            torch.get_num_threads(),
        )
        return y

    def _wide_linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        z = x.float()
        y = torch.empty(x.shape[0], packed.shape[0])
        # one buffer for all blocks, small enough for the cache: fresh pages for each cost more than decoding into them
        blocks = list(row_blocks(*packed.shape, WIDE_BLOCK_ELEMENTS))
        buffer = torch.empty(blocks[0][1], packed.shape[1])
        for start, stop in blocks:
            w = buffer[: stop - start]
            self._decode(packed, torch.arange(start, stop), w)
            torch.mm(z, w.T, out=y[:, start:stop])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        out = torch.empty(index.shape[0], packed.shape[1])
        self._decode(packed, index.contiguous(), out)
        return out

    def _decode(self, packed: Packed, index: Tensor, out: Tensor) -> None:
        self._layer(packed).rows(index.data_ptr(), index.shape[0], out.data_ptr(), torch.get_num_threads())

    def _layer(self, packed: Packed) -> Any:
        """The native module's Int4Layer: addresses of the tensors that `packed` keeps alive."""
        layer = packed.handle
        if layer is None:
            t, scheme = packed.tensors, _int_scheme(packed.scheme)
            zero = t["zero_point"].data_ptr() if "zero_point" in t else 0
            addresses = (t["codes"].data_ptr(), t["scale"].data_ptr(), zero)
            layer = cpu_module().Int4Layer(self.resolve_isa(), *addresses, *packed.shape, scheme.group_size)
            packed.handle = layer
        return layer


def _int_scheme(scheme: Scheme) -> IntScheme:
    if not isinstance(scheme, IntScheme):
        raise TypeError(f"cpu_int4 packs codec int, not {scheme}")
    return scheme


def _by_block(values: Tensor, blocks: int) -> Tensor:
    """[out, groups] -> [blocks, groups, 16], rows beyond `out` zero."""
    padded = values.new_zeros(blocks * BLOCK_ROWS, values.shape[1])
    padded[: values.shape[0]] = values
    return padded.view(blocks, BLOCK_ROWS, -1).transpose(1, 2).contiguous()


def _by_row(values: Tensor, out: int) -> Tensor:
    """The inverse of `_by_block`."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out].contiguous()


KERNEL = CpuInt4Kernel()
