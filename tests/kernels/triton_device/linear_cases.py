"""y = x W^T with 16-bit activations against the codec's decode in float64, at awkward shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpalette.kernels.triton_format import TileWeight
from bitpalette.kernels.triton_launch import Launch
from bitpalette.kernels.triton_linear import linear

Make = Callable[..., tuple[TileWeight, torch.Tensor]]


def int_(bits: int, group: int, symmetric: bool = True) -> dict[str, Any]:
    return {"codec": "int", "bits": bits, "group_size": group, "symmetric": symmetric}


def lut(entries: int, group: int) -> dict[str, Any]:
    return {"codec": "lut", "entries": entries, "table": "kmeans", "group_size": group}


def trellis(rate: float, window: int = 16) -> dict[str, Any]:
    return {"codec": "trellis", "rate": rate, "window": window}


E4M3: dict[str, Any] = {"codec": "float", "element": "e4m3", "group_size": 128}
FORMATS = [
    int_(4, 0),
    int_(4, 128),
    int_(4, 64, False),
    int_(4, 32, False),
    int_(8, 64, False),
    int_(8, 0),
    int_(3, 64),
    int_(3, 128, False),
    int_(2, 32, False),
    int_(2, 0, False),
    lut(16, 64),
    lut(12, 0),
    lut(8, 64),
    lut(4, 0),
    {"codec": "float", "element": "e2m1", "group_size": 32},
    E4M3,
    trellis(2.0),
    trellis(2.5, 12),
    trellis(3.0625, 14),
    trellis(5.0),
]
NAMES = [" ".join(str(v) for v in f.values()) for f in FORMATS]
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative error of the result: its rounding is up to 2^-11 and 2^-8 an element, 2.8e-4 and 2.3e-3 in the mean."""


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    reference = x.double() @ w.T + (0 if bias is None else bias.double())
    assert y.shape == reference.shape and y.dtype == x.dtype
    error = (y.double() - reference).norm() / reference.norm()
    assert float(error) <= TOLERANCE[x.dtype]
    assert bool(((y.double() - reference).abs() <= 0.02 * reference.abs().max()).all())


@pytest.mark.parametrize("scheme", FORMATS, ids=NAMES)
def test_three_tokens(scheme: dict[str, Any], weight: Make, device: torch.device) -> None:
    packed, w = weight(scheme, (123, 200))
    x = torch.randn(3, 200, device=device, dtype=torch.float16)
    bias = torch.randn(123, device=device, dtype=torch.float16)
    check(linear(x, packed, bias), x, w, bias)


@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("scheme", [int_(4, 64), int_(3, 0), trellis(3.0)], ids=["int4", "int3", "trellis"])
def test_tokens(scheme: dict[str, Any], tokens: int, weight: Make, device: torch.device) -> None:
    packed, w = weight(scheme, (70, 137))
    x = torch.randn(tokens, 137, device=device, dtype=torch.float16)
    parts = 1 if tokens > 16 else 2
    check(linear(x, packed, launch=Launch(128, 64 if tokens > 16 else 16, 128, parts, 4, 2)), x, w)


@pytest.mark.parametrize(
    "scheme", [int_(4, 0), int_(4, 32, False), int_(2, 64), lut(16, 0), E4M3, trellis(2.25)], ids=str
)
def test_bfloat16(scheme: dict[str, Any], weight: Make, device: torch.device) -> None:
    packed, w = weight(scheme, (65, 129))
    x = (torch.randn(5, 129, device=device) * 1e4).to(torch.bfloat16)
    bias = torch.randn(65, device=device, dtype=torch.bfloat16)
    check(linear(x, packed, bias), x, w, bias)


@pytest.mark.parametrize("scheme", FORMATS, ids=NAMES)
def test_one_hot_is_a_column(scheme: dict[str, Any], weight: Make, device: torch.device) -> None:
    """One column a token: the weight itself, rounded once. Every column is met once in 64."""
    packed, w = weight(scheme, (64, 192))
    columns = torch.randperm(192, device=device)[:64]
    x = torch.zeros(64, 192, device=device, dtype=torch.float16)
    x[torch.arange(64, device=device), columns] = 1
    y = linear(x, packed, launch=Launch(64, 64, 128, 1, 4, 2))
    assert torch.equal(y, w[:, columns].T.float().half())


EXACT = [int_(4, 64, False), int_(8, 0, False), int_(3, 32)]


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    # bfloat16 does not hold odd levels of the trellis beyond 256
    [(s, d) for s in EXACT for d in (torch.float16, torch.bfloat16)] + [(trellis(1.5), torch.float16)],
    ids=str,
)
def test_integers_are_exact(scheme: dict[str, Any], dtype: torch.dtype, weight: Make, device: torch.device) -> None:
    """Sums of integers times powers of two are exact in float32, in any order."""
    packed, w = weight(scheme, (65, 130), powers=True)
    x = torch.randint(-4, 5, (3, 130), device=device).to(dtype)
    assert torch.equal(linear(x, packed), (x.double() @ w.T).float().to(dtype))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_cover_all_columns(parts: int, weight: Make, device: torch.device) -> None:
    packed, w = weight(int_(4, 0), (64, 320), powers=True)
    x = torch.randint(-4, 5, (2, 320), device=device).half()
    y = linear(x, packed, launch=Launch(64, 16, 64, parts, 4, 2))
    assert torch.equal(y, (x.double() @ w.T).half())


def test_runs_are_equal(weight: Make, device: torch.device) -> None:
    packed, _ = weight(int_(4, 32), (64, 300))
    x = torch.randn(4, 300, device=device, dtype=torch.float16)
    assert torch.equal(linear(x, packed), linear(x, packed))


def test_nan_reaches_its_token_alone(weight: Make, device: torch.device) -> None:
    packed, _ = weight(int_(4, 64), (64, 100))
    x = torch.ones(2, 100, device=device, dtype=torch.float16)
    x[0, 99] = torch.nan
    y = linear(x, packed)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())


def test_no_tokens(weight: Make, device: torch.device) -> None:
    packed, _ = weight(int_(4, 64), (64, 100))
    assert linear(torch.empty(0, 100, device=device, dtype=torch.float16), packed).shape == (0, 64)


def test_other_inputs_are_refused(weight: Make, device: torch.device) -> None:
    packed, _ = weight(int_(4, 64), (64, 100))
    with pytest.raises(ValueError, match=r"x is contiguous \[tokens, 100\].*float32 \[2, 100\]"):
        linear(torch.zeros(2, 100, device=device), packed)
    with pytest.raises(ValueError, match=r"\[tokens, 100\].*\[2, 99\]"):
        linear(torch.zeros(2, 99, device=device, dtype=torch.float16), packed)
