"""int8 activations on a GPU: their sums are exact, so results are known to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.cuda_tiles import ACTIVATIONS_VARIABLE, GEMV_TOKENS
from bitpalette.quant.codec import get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import UNIT, TrellisScheme

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256]
SHAPES = [(1, 64), (17, 123), (130, 648), (577, 1537)]
DTYPES = [torch.float16, torch.bfloat16]

EXACT_FORMATS = [
    IntScheme(bits=4),
    IntScheme(bits=4, symmetric=False),
    IntScheme(bits=8),
    IntScheme(bits=8, symmetric=False),
    *(IntScheme(bits=4, group_size=g, symmetric=s, progressive=True) for g in (32, 64, 128) for s in (True, False)),
]


def natural(codes: Tensor, columns: int) -> Tensor:
    """int64 [tokens, columns] from the kernel's order of every four: 0, 2, 1, 3."""
    return codes.long().view(len(codes), -1, 4)[:, :, [0, 2, 1, 3]].reshape(len(codes), -1)[:, :columns]


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [tokens, columns], float32 [tokens]) on the CPU: x * (127 / largest) to nearest even; largest / 127.

    Both divided as IEEE says, of two tensors: torch multiplies by the reciprocal of a number, on a GPU, or for one.
    """
    x = x.float().cpu()
    largest = x.abs().amax(1)
    whole = torch.full_like(largest, 127)
    return (x * (whole / largest)[:, None]).round().long(), largest / whole


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("columns", [1, 17, 64, 577, 4096, 28672])
def test_activations_in_int8(cuda_kernel: Any, columns: int, dtype: torch.dtype, guards: Any, gpu: Any) -> None:
    from bitpalette.kernels.cuda_transform import CudaTransform

    torch.manual_seed(columns)
    transform = CudaTransform((), {}, columns, gpu)
    for tokens in (1, 9, 64):
        with guards() as g:
            x = torch.randn(tokens, columns, device=gpu) * torch.logspace(-3, 3, tokens, device=gpu)[:, None]
            x = g.copy(x.to(dtype))
            got = transform.quantize(x, planes=False)
            codes, scale = rounded(x)
            assert torch.equal(natural(got.codes, columns).cpu(), codes)
            assert not bool(got.codes[:, -(-columns // 4) * 4 :].any())
            assert torch.equal(got.scale.cpu(), scale)
            assert torch.equal(got.sum.long().cpu(), codes.sum(1))
            planes = transform.quantize(x, planes=True)
            assert planes.low is not None
            both = 256 * natural(planes.codes, columns) + natural(planes.low, columns)
            step = planes.scale.double()[:, None] / 256
            # to the nearest of 2 * 32512 steps, found in float32: to 32512 * 2^-22 of one
            assert bool(((both * step - x.double()).abs() <= 0.51 * step).all())
            assert torch.equal(planes.sum.long(), both.sum(1))


def levels(qt: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """(int64 [out, in], float32 [out]): a weight is level * scale, the second exact in float32."""
    row = qt.fields["scale"].float().view(qt.shape[0], -1)[:, 0]
    unit = row.double() / UNIT if isinstance(qt.scheme, TrellisScheme) else row.double()
    whole = get_codec(qt.scheme.codec).decode(qt).double() / unit[:, None]
    assert bool(((whole - whole.round()).abs() <= 1e-3).all())
    return whole.round().long(), unit.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", EXACT_FORMATS, ids=str)
def test_sums_of_w4a8_are_exact(
    cuda_kernel: Any,
    scheme: Scheme,
    dtype: torch.dtype,
    gpu_weight: Callable[..., Any],
    guards: Any,
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against int64 on the CPU: the sum to float32, times the row's scale, times the token's, rounded once."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "int8")
    for shape in SHAPES:
        with guards() as g:
            weight = gpu_weight(cuda_kernel, scheme, shape, g)
            if weight is None:
                continue
            level, row = levels(weight.qt)
            x = torch.randn(max(TOKENS), shape[1], device=gpu).to(dtype)
            codes, scale = rounded(x)
            want = ((codes @ level.T).float() * row * scale[:, None]).to(dtype)
            for tokens in TOKENS:
                got = weight(g.copy(x[:tokens])).cpu()
                assert torch.equal(got, want[:tokens]), f"{shape} tokens={tokens}"


def test_the_largest_sums_of_w4a8(
    cuda_kernel: Any, gpu_weight: Callable[..., Any], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product as large as it gets, with one sign: 28672 columns of 127 * 119 and of 127 * 128 in int32."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "int8")
    shape = (65, 28672)
    for scheme, byte in ((IntScheme(bits=8), 0), (IntScheme(bits=8), 255), (IntScheme(bits=4), 0)):
        codes = torch.full((shape[0] * shape[1] * scheme.bits // 8,), byte, dtype=torch.uint8)
        weight = gpu_weight(cuda_kernel, scheme, shape, codes=codes)
        level, row = levels(weight.qt)
        x = torch.ones(9, shape[1], device=gpu, dtype=torch.bfloat16)
        want = (float(127) * level.sum(1).double()).float() * row * torch.tensor(1.0) / 127
        assert float((weight(x).cpu().float() - want).abs().max()) <= 2.0**-8 * float(want.abs().max())


def test_groups_in_int8(
    cuda_kernel: Any, gpu_weight: Callable[..., Any], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 scales a group: int32 sums within a group, float32 over them."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "int8")
    for scheme in (IntScheme(bits=4, group_size=32), IntScheme(bits=4, group_size=128, symmetric=False)):
        weight = gpu_weight(cuda_kernel, scheme, (130, 648))
        x = torch.randn(129, 648, device=gpu).half()
        codes, scale = (t.to(gpu) for t in rounded(x))
        want = (codes.double() @ weight.decoded.T) * scale.double()[:, None]
        for tokens in (1, 8, 33, 129):
            error = (weight(x[:tokens]).double() - want[:tokens]).norm()
            assert float(error) <= 6e-4 * float(want[:tokens].norm())


RATES = [16, 17, 24, 32, 37, 40, 48, 49, 56, 64, 79, 80]


@pytest.mark.parametrize("form", ["int8", "exact"])
@pytest.mark.parametrize("m", RATES)
def test_the_gemv_of_a_trellis(
    cuda_kernel: Any,
    m: int,
    form: str,
    gpu_weight: Callable[..., Any],
    guards: Any,
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bitpalette.kernels.cuda_transform import CudaTransform

    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    scheme = TrellisScheme(rate=m / 16, window=(12, 14, 16)[m % 3])
    for shape in [(1, 16), (130, 648), (577, 1537), (1000, 4096)]:
        with guards() as g:
            weight = gpu_weight(cuda_kernel, scheme, shape, g)
            level, row = levels(weight.qt)
            transform = CudaTransform((), {}, shape[1], gpu)
            for tokens in range(1, GEMV_TOKENS + 1):
                for dtype in DTYPES:
                    x = g.copy(torch.randn(tokens, shape[1], device=gpu).to(dtype))
                    bias = g.copy(torch.randn(shape[0], device=gpu).to(dtype))
                    planes = transform.quantize(x, planes=form == "exact")
                    codes = natural(planes.codes, shape[1]).cpu()
                    if planes.low is not None:
                        codes = 256 * codes + natural(planes.low, shape[1]).cpu()
                    token = planes.scale.cpu() * (1 / 256 if planes.low is not None else 1)
                    total = (codes @ level.T).float() * token[:, None]
                    want = (total.double() * row.double() + bias.cpu().double()).float().to(dtype)
                    got = weight(x, bias)
                    assert torch.equal(got.cpu(), want), f"{shape} tokens={tokens} {dtype}"
                    if form == "exact":
                        exact = weight.expected(x, bias)
                        size = x.double().norm(dim=1, keepdim=True) * weight.decoded.norm(dim=1)
                        bound = (2.0**-11 if dtype == torch.float16 else 2.0**-8) * exact.abs() + 1e-4 * size
                        assert bool(((got.double() - exact).abs() <= bound).all())
