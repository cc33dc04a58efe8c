"""Which way the CUDA kernel takes for how many tokens: stand-ins for the module and its two ways, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpalette.kernels import cuda_tiles
from bitpalette.kernels.cuda_tiles import CudaWeight
from bitpalette.quant.int import IntScheme

SCHEME, SHAPE, CPU = IntScheme(bits=4, group_size=64), (24, 64), torch.device("cpu")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(way, tokens) of every product."""
    taken: list[tuple[str, int]] = []

    def gemm(weight: Any, call: Any, tokens: int, dtype: torch.dtype, *, int8: bool) -> None:
        taken.append(("codes", tokens))

    def dequantized(weight: Any, dtype: torch.dtype) -> torch.Tensor:
        taken.append(("dequantize", 0))
        return torch.zeros(weight.shape, dtype=dtype)

    monkeypatch.setattr(cuda_tiles, "_gemm", gemm)
    monkeypatch.setattr(cuda_tiles, "_dequantized", dequantized)
    monkeypatch.setattr(cuda_tiles, "cuda_module", lambda: SimpleNamespace(Call=lambda *args: None))
    return taken


def taken_by(ways: list[tuple[str, int]], tokens: int, dtype: torch.dtype = torch.float16, **of: Any) -> list[str]:
    values = {"most_tokens": 256, "batch_invariant": False} | of
    identity: Any = None
    weight = CudaWeight(None, "int4", SCHEME, SHAPE, CPU, "16bit", identity=identity, **values)
    ways.clear()
    y = cuda_tiles._product(weight, torch.zeros(tokens, 64, dtype=dtype), None, None)
    assert y.shape == (tokens, 24) and y.dtype == dtype
    return [f"{way} {count}" if way == "codes" else way for way, count in ways]


def test_by_what_was_measured(ways: Any) -> None:
    assert taken_by(ways, 256) == ["codes 256"] and taken_by(ways, 257) == ["dequantize"]
    assert taken_by(ways, 64, most_tokens=64) == ["codes 64"]
    assert taken_by(ways, 65, most_tokens=64) == taken_by(ways, 1, most_tokens=0) == ["dequantize"]
    assert taken_by(ways, 1, torch.float32) == ["dequantize"]


def test_batch_invariant_tokens_have_one_way(ways: Any) -> None:
    """Whatever was measured: another way gives other bits."""
    assert taken_by(ways, 65, most_tokens=64, batch_invariant=True) == ["codes 65"]
    assert taken_by(ways, 600, batch_invariant=True) == ["codes 256", "codes 256", "codes 88"]
    assert taken_by(ways, 1, torch.float32, batch_invariant=True) == ["dequantize"]


def test_a_weight_asks_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cuda_tiles, "most_tokens", lambda *args: asked.append(args) or 32)
    monkeypatch.setattr(cuda_tiles, "CudaTransform", lambda *args: None)
    monkeypatch.setattr(cuda_tiles, "cuda_module", lambda: SimpleNamespace(PackedWeight=lambda *args: None))
    packed = cuda_tiles.Packed(SCHEME, SHAPE, {"codes": torch.zeros(1), "scale": torch.zeros(1)})
    weight = cuda_tiles.KERNEL.weight(packed)
    assert weight.most_tokens == 32 and asked == [(SCHEME, SHAPE, CPU, "cuda", 256)]
