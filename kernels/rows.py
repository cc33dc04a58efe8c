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

    index: int64 [n], or a slice. Codecs that do not store rows one after another are decoded whole.
    """
    codec, (out_features, in_features) = get_codec(qt.scheme.codec), (qt.shape[0], qt.shape[1])
    if isinstance(index, slice) and (index.start, index.stop) == (0, out_features):
        return codec.decode(qt)
    by_row = _fields_by_row(qt.scheme, out_features, in_features)
    if by_row is None:
        return codec.decode(qt)[index]
    fields = {name: qt.fields[name] for name in codec.fields(qt.scheme, (out_features, in_features))}
    for name in by_row:
        field = fields[name]
        taken = field.view(out_features, -1)[index]
        fields[name] = taken.flatten() if field.dim() == 1 else taken.view(-1, *field.shape[1:])
    n = fields["codes"].numel() * out_features // qt.fields["codes"].numel()
    if n == 0:
        return torch.empty(0, in_features, device=qt.fields["codes"].device)
    bare = qt.scheme.replace(transforms=())
    return codec.decode(QuantizedTensor(bare, (n, in_features), fields))


@cache
def _fields_by_row(scheme: Scheme, out_features: int, in_features: int) -> frozenset[str] | None:
    """The fields that grow with the rows, in proportion; None where one grows otherwise (tiles of rows)."""
    codec = get_codec(scheme.codec)
    one, all_ = codec.fields(scheme, (1, in_features)), codec.fields(scheme, (out_features, in_features))
    two = codec.fields(scheme, (2, in_features))
    names = set()
    for name, (shape, _) in all_.items():
        if two[name][0] == one[name][0]:
            if shape != one[name][0]:
                return None
        elif shape[0] == out_features * one[name][0][0] and shape[1:] == one[name][0][1:]:
            names.add(name)
        else:
            return None
    return frozenset(names) if "codes" in names else None
