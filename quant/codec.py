"""How numbers become bits. A codec is a module of this folder with a `CODEC`; it is found by its name."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .registry import registered
from .scheme import Scheme, SchemeError
from .tensor import QuantizedTensor

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""{field name: (shape, dtype)}: what a tensor is stored as, known from the scheme and the shape alone."""


class Grid(Protocol):
    """The levels that one matrix [out, in] may take, while a solver chooses among them.

    A solver calls `fit` once (then `fit_group`, if it likes, for one column group after another, with the weights as
    error feedback has left them), then `nearest` for blocks of columns in any order, then `pack`.
    """

    group_size: int
    """Columns that share parameters; 0: the whole row."""

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        """Choose every scale, zero point or table for w [out, in]; importance [in] weighs the squared error."""

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        """As `fit`, for the columns of one group only: w [out, columns of the group]."""

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(codes uint8, values float32 [out, n]) nearest to w [out, n], the given columns of the matrix (int64, there
        or on the CPU): whole blocks (`Scheme.block`; the matrix's last may be short). Dimension 1 of the codes counts
        blocks; all else about them is the grid's."""

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """The codec's fields, canonical layout, from what `fit` chose and the codes of all blocks in natural order,
        concatenated along dimension 1."""


class Codec(Protocol):
    name: str
    scheme_class: type[Scheme]
    rows_together: int
    """Rows whose codes cannot be told apart: 1, or 16 for tiles. Fields have a part for each such group of rows."""

    def fields(self, scheme: Any, shape: tuple[int, int]) -> Fields:
        """What a weight [out_features, in_features] is stored as; "codes" is flat uint8, always there."""

    def grid(self, scheme: Any, shape: tuple[int, int], device: torch.device) -> Grid:
        """A fresh grid for one matrix."""

    def decode(self, qt: QuantizedTensor) -> Tensor:
        """The weight as stored, float32 [out, in], before any transform is undone. The reference of every kernel."""

    def tolerance(self, scheme: Any) -> float:
        """Largest relative error ||y - y_ref|| / ||y_ref|| a kernel with 8-bit activations may show."""


def codec_names() -> list[str]:
    return list(registered("CODEC"))


def get_codec(name: str) -> Codec:
    """The codec of that name, or SchemeError that lists those there are."""
    codecs = registered("CODEC")
    if name not in codecs:
        raise SchemeError(f"unknown codec {name!r}; there are {list(codecs)}")
    return codecs[name]


def group_count(in_features: int, group_size: int) -> int:
    """Number of column groups; the last may be short. group_size 0 is one group: the whole row."""
    return 1 if group_size == 0 else -(-in_features // group_size)


def group_of_column(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group index of every column, int64 [in_features]."""
    columns = torch.arange(in_features, device=device)
    return columns // (group_size or in_features)
