"""Rows of a weight in canonical layout, without decoding the others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..quant.codec import get_codec
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor

BLOCK_ELEMENTS = 1 << 22
"""Weights decoded at a time: 16 MiB of float32, small beside a model and large beside the cost of a call."""


def row_blocks(out_features: int, in_features: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks of about `elements` weights; multiples of 16 rows but for the last."""
    step = max(16, elements // in_features // 16 * 16)
    for start in range(0, out_features, step):
        yield start, min(start + step, out_features)


def decode_rows(qt: QuantizedTensor, index: Tensor | slice) -> Tensor:
    """float32 [n, in]: rows of a two-dimensional weight as the codec stores it, transforms not undone.

    index: int64 [n], or a slice. Where the codec's rows hang together (tiles), whole groups of them are decoded; where
    a field is not stored row by row (per input channel), it goes to every row.
    """
    codec, (out_features, in_features) = get_codec(qt.scheme.codec), (qt.shape[0], qt.shape[1])
    if isinstance(index, slice) and (index.start, index.stop) == (0, out_features):
        return codec.decode(qt)
    device = qt.fields["codes"].device
    rows = torch.arange(out_features, device=device)[index] if isinstance(index, slice) else index.to(device)
    if rows.numel() == 0:
        return torch.empty(0, in_features, device=device)
    height = codec.rows_together
    groups, place = torch.unique(rows // height, return_inverse=True) if height > 1 else (rows, None)
    split = _fields_by_row(qt.scheme, out_features, in_features)
    fields = {}
    for name in codec.fields(qt.scheme, (out_features, in_features)):
        field = qt.fields[name]
        if name in split:
            parts = -(-out_features // height)
            if name != "codes" and parts * height != out_features:  # a part for each row: the last group may be short
                field = torch.cat([field, field[-1:].expand(parts * height - out_features, *field.shape[1:])])
            taken = field.view(parts, -1)[groups]
            field = taken.flatten() if field.dim() == 1 else taken.view(-1, *field.shape[1:])
        fields[name] = field
    bare = qt.scheme.replace(transforms=())
    w = codec.decode(QuantizedTensor(bare, (len(groups) * height, in_features), fields))
    return w if place is None else w[place * height + rows % height]


@cache
def _fields_by_row(scheme: Scheme, out_features: int, in_features: int) -> frozenset[str]:
    """The fields that grow with the rows."""
    codec = get_codec(scheme.codec)
    one = codec.fields(scheme, (codec.rows_together, in_features))
    two = codec.fields(scheme, (2 * codec.rows_together, in_features))
    return frozenset(name for name in one if one[name] != two[name])
