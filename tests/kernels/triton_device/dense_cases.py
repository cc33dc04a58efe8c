"""Weights written out by Triton kernels are what the codec decodes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpalette.kernels.triton_dense import dequantize, rows
from bitpalette.kernels.triton_format import TileWeight

Make = Callable[..., tuple[TileWeight, torch.Tensor]]

FORMATS: list[dict[str, Any]] = [
    *({"codec": "int", "bits": b, "group_size": 0, "symmetric": True} for b in (2, 3, 4, 8)),
    *({"codec": "int", "bits": b, "group_size": 32, "symmetric": False} for b in (2, 3, 4, 8)),
    *({"codec": "lut", "entries": e, "table": "kmeans", "group_size": 64} for e in (4, 7, 8, 9, 16)),
    {"codec": "lut", "entries": 16, "table": "kmeans", "scaled": False},
    *({"codec": "float", "element": e, "group_size": 64} for e in ("e2m1", "e4m3")),
    *({"codec": "trellis", "rate": m / 16, "window": w} for m, w in [(16, 16), (33, 14), (80, 12)]),
]


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_dequantize(scheme: dict[str, Any], weight: Make, device: torch.device) -> None:
    packed, w = weight(scheme, (35, 131))
    assert torch.equal(dequantize(packed, torch.float32), w.float())
    assert torch.equal(dequantize(packed, torch.float16), w.float().half())
    assert torch.equal(dequantize(packed, torch.bfloat16), w.float().bfloat16())


def test_every_rate_of_the_trellis(weight: Make, device: torch.device) -> None:
    for row_bits in range(16, 81):
        packed, w = weight({"codec": "trellis", "rate": row_bits / 16}, (16, 16))
        assert torch.equal(dequantize(packed, torch.float32), w.float()), row_bits


@pytest.mark.parametrize("scheme", [FORMATS[2], FORMATS[5], FORMATS[8], FORMATS[17]], ids=str)
def test_rows(scheme: dict[str, Any], weight: Make, device: torch.device) -> None:
    packed, w = weight(scheme, (130, 70))
    index = torch.tensor([129, 0, 64, 64, 63, 8, 7], device=device)
    assert torch.equal(rows(packed, index), w.float()[index])
    assert torch.equal(rows(packed, index[:1], torch.float16), w.float()[index[:1]].half())
    assert rows(packed, index[:0]).shape == (0, 70)


def test_other_arguments_are_refused(weight: Make, device: torch.device) -> None:
    packed, _ = weight(FORMATS[0], (64, 64))
    with pytest.raises(ValueError, match=r"index is int64 \[n\].*int32"):
        rows(packed, torch.zeros(2, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"one of torch\.float16.*float64"):
        dequantize(packed, torch.float64)
