"""The packed form of a weight on a GPU, one for every CUDA and Triton kernel: codes in tiles, parameters group-major.

    codes         int32 [NP / 64, KP / 64, words]   NP, KP: out and in rounded up to 64; `tile_codes` draws a superblock
    scale         float16 [groups, NP]              0 in rows beyond out and in groups beyond in; trellis: [1, NP]
    zero_point    uint8 [groups, NP]                asymmetric `int` only; else it is 2^(bits-1)
    group_scale   uint8 [groups, NP]                progressive `int` only, whose scale is [1, NP]
    group_offset  uint8 [groups, NP]                and 128 - zero_point * group_scale in place of the zero point:
                                                    code * group_scale + group_offset - 128 is the int8 level
    table         float16 [16]                      `lut`: one for the tensor, zeros beyond its entries; e2m1's values

Codes beyond the matrix are 0: a kernel fills activations beyond K with zeros and stores no row beyond N. Group k / g
holds column k; groups are of 32 columns or of multiples of 64, or the whole row (one group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.bitstream import pack_bits, row_bytes, unpack_bits
from ..quant.float import FloatScheme
from ..quant.int import IntScheme
from ..quant.lut import LutScheme
from ..quant.scheme import Scheme, SchemeError
from ..quant.tensor import QuantizedTensor
from ..quant.trellis import TrellisScheme, tile_count
from .tile_codes import SUPERBLOCK, TILE, WORDS, Layout, pack_codes, pack_trellis, padded, unpack_codes, unpack_trellis
from .tile_parameters import TABLE_ENTRIES, group_major, pack_parameters, unpack_parameters

CHUNK = 1 << 22
"""Weights packed at a time: temporaries of some 40 MiB."""

_INT_LAYOUTS: dict[int, Layout] = {2: "bits2", 3: "bits3", 4: "bits4", 8: "bits8"}
_FLOAT_LAYOUTS: dict[str, Layout] = {"e2m1": "pairs4", "e4m3": "bits8"}


def code_layout(scheme: Scheme) -> Layout | None:
    """How `tile_codes` stores the codes of a scheme; None where it does not, and for the trellis."""
    if isinstance(scheme, IntScheme):
        return _INT_LAYOUTS.get(scheme.bits)
    if isinstance(scheme, LutScheme) and scheme.entries <= TABLE_ENTRIES:
        return "pairs4" if scheme.entries > 8 else "pairs3" if scheme.entries > 4 else "pairs2"
    if isinstance(scheme, FloatScheme):
        return _FLOAT_LAYOUTS.get(scheme.element)
    return None


def why_not_tiles(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None where a weight of this scheme and shape has this packed form, else the reason in words."""
    if len(shape) != 2:
        return f"packs one weight [out_features, in_features], not {list(shape)}"
    if scheme.transforms:
        return f"packs what the codec stores, without transforms {list(scheme.transforms)}"
    if isinstance(scheme, TrellisScheme):
        return None
    if isinstance(scheme, IntScheme):
        if scheme.per_input_channel:
            return "needs scales along the rows, not one for each input channel"
        if code_layout(scheme) is None:
            return f"packs int codes of {', '.join(map(str, _INT_LAYOUTS))} bits, not {scheme.bits}"
    elif isinstance(scheme, LutScheme):
        if scheme.dims != 1:
            return f"packs a code for each weight, not for {scheme.dims}"
        if scheme.table_scope != "tensor":
            return "needs one table for the tensor, not one a row"
        if code_layout(scheme) is None:
            return f"packs tables of 4 to 16 entries, not {scheme.entries}"
    elif isinstance(scheme, FloatScheme):
        if code_layout(scheme) is None:
            return f"packs float elements {' and '.join(_FLOAT_LAYOUTS)}, not {scheme.element}"
        if scheme.scale_format != "fp16":
            return f"needs scales of fp16, not {scheme.scale_format}"
    else:
        return f"packs codecs float, int, lut and trellis, not {scheme.codec}"
    if scheme.group_size % SUPERBLOCK and scheme.group_size != 32:
        return f"needs a group_size of 32, a multiple of {SUPERBLOCK} or 0 (whole row), not {scheme.group_size}"
    return None


def pack_tiles(qt: QuantizedTensor) -> dict[str, Tensor]:
    """{name: tensor} of a weight [out, in] on the device of its fields.

    Raises SchemeError with `why_not_tiles`' reason, and where progressive scales would overflow a byte.
    """
    scheme, shape = qt.scheme, _matrix(qt.scheme, qt.shape)
    if isinstance(scheme, TrellisScheme):
        return {"codes": _pack_trellis_codes(qt, shape), "scale": group_major(qt.fields["scale"][:, None])}
    return {"codes": _pack_plain_codes(qt.fields["codes"], shape, *_layout_and_bits(scheme)), **pack_parameters(qt)}


def unpack_tiles(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> QuantizedTensor:
    """The exact inverse of `pack_tiles`, bit for bit."""
    shape = _matrix(scheme, shape)
    if isinstance(scheme, TrellisScheme):
        codes = _unpack_trellis_codes(tensors["codes"], shape, scheme.row_bits)
        return QuantizedTensor(scheme, shape, {"codes": codes, "scale": tensors["scale"][0, : shape[0]].clone()})
    assert isinstance(scheme, IntScheme | LutScheme | FloatScheme)
    codes = _unpack_plain_codes(tensors["codes"], shape, *_layout_and_bits(scheme))
    return QuantizedTensor(scheme, shape, {"codes": codes, **unpack_parameters(scheme, shape, tensors)})


def _matrix(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    reason = why_not_tiles(scheme, shape)
    if reason is not None:
        raise SchemeError(f"{scheme} {list(shape)} has no tiles: {reason}; dequantize it instead")
    return shape[0], shape[1]


def _layout_and_bits(scheme: Scheme) -> tuple[Layout, int]:
    """(layout, bits of a canonical code) of a scheme that `why_not_tiles` lets through."""
    layout = code_layout(scheme)
    if layout is None:
        raise SchemeError(f"{scheme} has no tiles")
    return layout, scheme.bits  # type: ignore[attr-defined]


def _pack_plain_codes(codes: Tensor, shape: tuple[int, int], layout: Layout, bits: int) -> Tensor:
    out, n = shape
    stream = codes.view(out, row_bytes(n, bits))
    columns = padded(n)
    packed = torch.empty(
        padded(out) // SUPERBLOCK, columns // SUPERBLOCK, WORDS[layout], dtype=torch.int32, device=codes.device
    )
    step = max(1, CHUNK // (SUPERBLOCK * columns))
    for first in range(0, len(packed), step):
        to = packed[first : first + step]
        rows = slice(first * SUPERBLOCK, min((first + step) * SUPERBLOCK, out))
        part = unpack_bits(stream[rows], n, bits)
        if tuple(part.shape) != (len(to) * SUPERBLOCK, columns):
            whole = part.new_zeros(len(to) * SUPERBLOCK, columns)
            whole[: len(part), :n] = part
            part = whole
        to.copy_(pack_codes(part, layout))
    return packed


def _unpack_plain_codes(packed: Tensor, shape: tuple[int, int], layout: Layout, bits: int) -> Tensor:
    out, n = shape
    stream = torch.empty(out, row_bytes(n, bits), dtype=torch.uint8, device=packed.device)
    step = max(1, CHUNK // (SUPERBLOCK * padded(n)))
    for first in range(0, len(packed), step):
        rows = stream[first * SUPERBLOCK : (first + step) * SUPERBLOCK]
        part = unpack_codes(packed[first : first + step], layout)
        rows.copy_(pack_bits(part[: len(rows), :n], bits))
    return stream.flatten()


def _pack_trellis_codes(qt: QuantizedTensor, shape: tuple[int, int]) -> Tensor:
    tile_rows, tiles = tile_count(shape)
    codes = qt.fields["codes"].view(tile_rows, tiles, -1)
    whole = padded(shape[0]) // TILE, padded(shape[1]) // TILE
    if whole != (tile_rows, tiles):
        inside, codes = codes, codes.new_zeros(*whole, codes.shape[2])
        codes[:tile_rows, :tiles] = inside
    return pack_trellis(codes)


def _unpack_trellis_codes(packed: Tensor, shape: tuple[int, int], row_bits: int) -> Tensor:
    tile_rows, tiles = tile_count(shape)
    return unpack_trellis(packed, row_bits)[:tile_rows, :tiles].reshape(-1)
