"""R R = I and R = R^T for every size, against the definition; the random signs, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import bitpalette.quant.hartley as hartley
from bitpalette.quant.hartley import hartley_hadamard, odd_part
from bitpalette.quant.rotate import _GAMMA, _mix, random_signs, sign_vector

SIZES = [1, 2, 3, 4, 7, 9, 12, 17, 35, 48, 123, 576, 577, 1536, 1537, 2048, 2062, 5632]


def matrix(n: int) -> torch.Tensor:
    """R by its definition, float64."""
    odd, log2 = odd_part(n)
    i = torch.arange(odd, dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(i, i) / odd
    r = (angle.cos() + angle.sin()) / math.sqrt(odd)
    size = 1 << log2
    sign = [[(-1) ** bin(a & b).count("1") for b in range(size)] for a in range(size)]
    return torch.kron(r, torch.tensor(sign, dtype=torch.float64) / math.sqrt(size))


@pytest.mark.parametrize("n", SIZES)
def test_own_inverse_and_norm(n: int, rng_weight) -> None:
    x = rng_weight(5, n)
    y = hartley_hadamard(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert (hartley_hadamard(y) - x).abs().max() < 1e-5
    assert (y.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-5
    gram = y.double() @ y.double().T
    assert (gram - x.double() @ x.double().T).abs().max() < 1e-4 * n**0.5


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 577])
def test_against_the_definition(n: int) -> None:
    r = matrix(n)
    assert (r - r.T).abs().max() < 1e-9
    assert (hartley_hadamard(torch.eye(n)) - r.float()).abs().max() < 1e-5


@pytest.mark.parametrize("n", [9, 12, 35, 576, 577])
def test_fft_of_large_odd_parts_is_the_same_transform(n: int, monkeypatch: pytest.MonkeyPatch, rng_weight) -> None:
    x = rng_weight(3, n)
    dense = hartley_hadamard(x)
    monkeypatch.setattr(hartley, "DENSE_ODD", 1)
    assert (hartley_hadamard(x) - dense).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_leading_dimensions_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, rng_weight) -> None:
    x = rng_weight(*shape).to(dtype)
    y = hartley_hadamard(x)
    assert y.shape == x.shape and y.dtype == dtype
    assert torch.equal(y, (x.float() @ matrix(12).float()).to(dtype)) or (
        (y.float() - x.float() @ matrix(12).float()).abs().max() < 0.02
    )


def test_gradient_after_a_first_call_in_inference_mode(rng_weight) -> None:
    hartley.hartley_matrix.cache_clear()
    x = rng_weight(2, 24)
    with torch.inference_mode():
        hartley_hadamard(x)
    x.requires_grad_()
    hartley_hadamard(x)[0, 0].backward()
    assert torch.allclose(x.grad[0], matrix(24)[0].float(), atol=1e-6)


def test_a_default_dtype_does_not_reach_the_cache(rng_weight) -> None:
    hartley.hartley_matrix.cache_clear()
    x = rng_weight(2, 24)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            y = hartley_hadamard(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (y - x @ matrix(24).float()).abs().max() < 1e-5


def test_it_spreads_an_outlier() -> None:
    x = torch.zeros(1, 576)
    x[0, 5] = 24.0
    assert hartley_hadamard(x).abs().max() < 1.5  # 24 / sqrt(576) = 1, times at most sqrt(2) from the Hartley part


def test_signs_golden_bytes() -> None:
    assert _mix(1234567 + _GAMMA & (1 << 64) - 1) == 6457827717110365317  # splitmix64's published first output
    assert bytes(random_signs(0, 64).tolist()).hex() == "9c913de84b754619"
    assert bytes(random_signs(1, 100).tolist()).hex() == "eecdfea71a3bec4c4a7df78e07"
    assert bytes(random_signs(-1, 9).tolist()) == bytes(random_signs((1 << 64) - 1, 9).tolist())


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65, 576, 577, 4864])
def test_signs(n: int) -> None:
    signs = random_signs(3, n)
    assert signs.shape == (-(-n // 8),) and signs.dtype == torch.uint8
    vector = sign_vector(signs, n)
    assert vector.shape == (n,) and torch.equal(vector.abs(), torch.ones(n))
    bits = int.from_bytes(bytes(signs.tolist()), "little")
    assert vector.tolist() == [-1.0 if bits >> j & 1 else 1.0 for j in range(n)]
    assert bits >> n == 0
    if n >= 576:
        assert abs(float(vector.mean())) < 4 / math.sqrt(n)
        assert not torch.equal(signs, random_signs(4, n))
