"""Scales, zero points and tables beside the tiles, group-major, rows padded to superblocks; `tiles.py` lists them.

Group-major, a warp's rows of one group are consecutive: one wide load serves a tile whatever the number of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.bitstream import pack_bits, unpack_bits
from ..quant.codec import group_count
from ..quant.float import FloatScheme
from ..quant.int import IntScheme
from ..quant.int_progressive import check_group_scales
from ..quant.lut import LutScheme
from ..quant.tensor import QuantizedTensor
from .tile_codes import padded

TABLE_ENTRIES = 16

SIGN = 128
"""Added to a level -128..127, the unsigned byte with whose sign bit flipped it is that level."""


def pack_parameters(qt: QuantizedTensor) -> dict[str, Tensor]:
    """All but the codes of a two-dimensional weight of codec int, lut or float."""
    scheme, (out, columns) = qt.scheme, qt.shape
    groups = group_count(padded(columns), scheme.group_size)  # type: ignore[attr-defined]
    if isinstance(scheme, IntScheme):
        return _pack_int(qt, scheme, groups)
    if isinstance(scheme, FloatScheme):
        tensors = {"scale": group_major(qt.fields["scale"], groups)}
        if scheme.element == "e2m1":  # looked up like any table of 16; the others are converted
            tensors["table"] = scheme.format.values.to(tensors["scale"])
        return tensors
    table = qt.fields["table"]
    scale = qt.fields["scale"] if "scale" in qt.fields else table.new_ones(out, 1)  # a table in units of the weights
    return {
        "scale": group_major(scale, groups),
        "table": torch.cat([table, table.new_zeros(TABLE_ENTRIES - len(table))]),
    }


def unpack_parameters(
    scheme: IntScheme | LutScheme | FloatScheme, shape: tuple[int, int], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse: the codec's fields without the codes."""
    out, groups = shape[0], group_count(shape[1], scheme.group_size)
    if isinstance(scheme, IntScheme):
        return _unpack_int(scheme, out, groups, tensors)
    fields = {}
    if isinstance(scheme, FloatScheme) or scheme.scaled:
        fields["scale"] = row_major(tensors["scale"], out, groups)
    if isinstance(scheme, LutScheme):
        fields["table"] = tensors["table"][: scheme.entries].clone()
    return fields


def group_major(values: Tensor, groups: int = 1) -> Tensor:
    """[out, groups or fewer] -> [groups, NP], zeros beyond."""
    whole = values.new_zeros(groups, padded(values.shape[0]))
    whole[: values.shape[1], : values.shape[0]] = values.T
    return whole


def row_major(values: Tensor, out: int, groups: int = 1) -> Tensor:
    """The inverse: [out, groups], contiguous."""
    return values[:groups, :out].T.contiguous()


def _pack_int(qt: QuantizedTensor, scheme: IntScheme, groups: int) -> dict[str, Tensor]:
    scale = qt.fields["scale"]
    if not scheme.progressive:
        tensors = {"scale": group_major(scale, groups)}
        if not scheme.symmetric:
            tensors["zero_point"] = group_major(_zero_points(qt, scheme), groups)
        return tensors
    whole, zero = qt.fields["group_scale"], _zero_points(qt, scheme)
    check_group_scales(whole, zero)
    return {
        "scale": group_major(scale),
        "group_scale": group_major(whole, groups),
        "group_offset": group_major(SIGN - zero * whole, groups),  # 9 to 128: nothing wraps
    }


def _unpack_int(scheme: IntScheme, out: int, groups: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not scheme.progressive:
        fields = {"scale": row_major(tensors["scale"], out, groups)}
        if not scheme.symmetric:
            fields["zero_point"] = pack_bits(row_major(tensors["zero_point"], out, groups), scheme.bits)
        return fields
    whole = row_major(tensors["group_scale"], out, groups)
    fields = {"scale": row_major(tensors["scale"], out), "group_scale": whole}
    if not scheme.symmetric:
        zero = (SIGN - row_major(tensors["group_offset"], out, groups)) // whole
        fields["zero_point"] = pack_bits(zero, scheme.bits)
    return fields


def _zero_points(qt: QuantizedTensor, scheme: IntScheme) -> Tensor:
    """uint8 [out, groups]."""
    groups = group_count(qt.shape[1], scheme.group_size)
    if scheme.symmetric:
        return torch.full((qt.shape[0], groups), int(scheme.zero), dtype=torch.uint8, device=qt.fields["codes"].device)
    return unpack_bits(qt.fields["zero_point"], groups, scheme.bits)
