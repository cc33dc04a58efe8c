"""What Triton kernels are compiled for and what they read: a weight's tiles, and how they are understood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..quant.float import FloatScheme
from ..quant.int import IntScheme
from ..quant.lut import LutScheme
from ..quant.scheme import Scheme
from ..quant.trellis import UNIT, TrellisScheme
from .tile_codes import Layout
from .tiles import code_layout

Kind = Literal["int", "table", "e4m3", "trellis"]
ScaleAt = Literal["end", "step", "weight"]


@dataclass(frozen=True)
class TileFormat:
    """kind: how a code becomes a value. layout: how codes lie in words. group_size in columns, 0 for the whole row.

    zero: the zero point of symmetric `int`; None where there is a tensor of them. row_bits and window: trellis alone.
    """

    kind: Kind
    layout: Layout | Literal["trellis"]
    group_size: int = 0
    zero: int | None = 0
    row_bits: int = 0
    window: int = 0

    @property
    def word_columns(self) -> int:
        """Columns of a superblock's matrix of words (triton_device/decode.py)."""
        return 8 if self.layout in ("bits2", "bits3", "pairs2", "pairs3") else 16

    @property
    def unit(self) -> float:
        """Value = level * scale * unit."""
        return 1 / UNIT if self.kind == "trellis" else 1.0

    def scale_at(self, block_k: int) -> ScaleAt:
        """Where a kernel with steps of block_k columns multiplies by the scale."""
        if self.group_size == 0:
            return "end"
        return "weight" if self.group_size % block_k else "step"

    def constants(self) -> dict[str, int | float | str | bool]:
        """The constexpr arguments that kernels of 16-bit values share."""
        return {
            "SYMMETRIC_ZERO": self.zero or 0,
            "HAS_ZERO": self.zero is None,
            "KIND": self.kind,
            "LAYOUT": self.layout,
            "WORD_COLUMNS": self.word_columns,
            "ROW_BITS": self.row_bits,
            "WINDOW": self.window,
            "UNIT": self.unit,
            "GROUP": self.group_size,
        }

    def __str__(self) -> str:
        parts = [self.kind, self.layout if self.kind != "trellis" else f"{self.row_bits}/16 window {self.window}"]
        if self.kind != "trellis":
            parts.append(f"group {self.group_size}" if self.group_size else "channel")
        if self.zero is None:
            parts.append("asymmetric")
        return " ".join(parts)


@dataclass(frozen=True)
class TileWeight:
    """A weight [out_features, in_features] as Triton kernels read it: the tensors of `pack_tiles`, a table of pairs.

    group_scale and group_offset: progressive scales, uint8 [groups, NP], `linear_w4a8` alone.
    """

    form: TileFormat
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None
    group_scale: Tensor | None = None
    group_offset: Tensor | None = None


def tile_format(scheme: Scheme) -> TileFormat:
    """The format of a scheme that `tiles.why_not_tiles` lets through. TypeError for another."""
    if isinstance(scheme, TrellisScheme):
        return TileFormat("trellis", "trellis", row_bits=scheme.row_bits, window=scheme.window)
    layout = code_layout(scheme)
    if layout is not None and isinstance(scheme, IntScheme):
        return TileFormat("int", layout, scheme.group_size, 1 << (scheme.bits - 1) if scheme.symmetric else None)
    if layout is not None and isinstance(scheme, LutScheme):
        return TileFormat("table", layout, scheme.group_size)
    if layout is not None and isinstance(scheme, FloatScheme):
        return TileFormat("e4m3" if layout == "bits8" else "table", layout, scheme.group_size)
    raise TypeError(f"{scheme} has no tiles")


def tile_weight(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> TileWeight:
    """A weight from the tensors of `pack_tiles`; nothing but a table is copied."""
    form = tile_format(scheme)
    table = tensors.get("table")
    return TileWeight(
        form,
        shape,
        tensors["codes"],
        tensors["scale"],
        tensors.get("zero_point"),
        None if table is None else pair_table(table),
        tensors.get("group_scale"),
        tensors.get("group_offset"),
    )


def pair_table(table: Tensor) -> Tensor:
    """float16 [16] -> int32 [256]: entry i is table[i & 15] in the low half, table[i >> 4] in the high one.

    A byte of the layouts pairs* is then one look-up for two weights.
    """
    bits = table.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return (bits[:, None] << 16 | bits[None, :]).flatten().contiguous()
