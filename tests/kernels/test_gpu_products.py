"""Products on a GPU: every format, type, number of tokens and ragged shape, by CUDA and by Triton, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.cuda_tiles import MOST_TOKENS
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.trellis import TrellisScheme

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256]
BEYOND = [300, 513]
"""More than MOST_TOKENS: the weight is dequantized and cuBLAS multiplies."""

SHAPES = [(1, 1), (1, 8), (17, 123), (64, 64), (123, 577), (130, 648), (577, 1537)]
DTYPES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Of the norm of the result: its rounding, and in bf16 that of a table's entries and of a trellis' levels."""

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
INT8_ERROR = 0.02
"""Activations rounded to int8 as well: progressive `int`."""


def tolerance(scheme: Scheme, dtype: torch.dtype) -> float:
    return INT8_ERROR if isinstance(scheme, IntScheme) and scheme.progressive else TOLERANCE[dtype]


def assert_close(y: Tensor, want: Tensor, size: Tensor, columns: int, relative: float, dtype: torch.dtype) -> None:
    """In the norm over all, and each element to a few roundings, or `relative`, of its size: sum |x| |w|."""
    assert y.dtype == dtype and y.shape == want.shape
    error = (y.double() - want).abs()
    # few outputs may all be near zero by chance: no less than what terms of random signs would sum to
    norm = max(float(want.norm()), float(size.norm()) / columns**0.5)
    assert float(error.norm()) <= relative * norm, f"relative error {float(error.norm()) / norm:.3g}"
    # and fp16 below 2^-14 is to 2^-25: a weight times an x of 5, and the result
    allowed = max(4 * EPSILON[dtype], relative) * size + (2.0**-22 if dtype == torch.float16 else 1e-12)
    assert bool((error <= allowed).all()), f"element {int((error / allowed).nan_to_num(torch.inf).argmax())}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_shape_and_number_of_tokens(
    gpu_kernel: Any, gpu_scheme: Scheme, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: torch.device
) -> None:
    torch.manual_seed(1)
    tried = 0
    # Triton compiles for each class of tokens and type, a second or so each
    shapes, counts = (SHAPES, TOKENS + BEYOND) if gpu_kernel.name == "cuda" else ([(130, 648)], [1, 17, 65, 300])
    for shape in shapes:
        weight = gpu_weight(gpu_kernel, gpu_scheme, shape)
        if weight is None:
            continue
        x = torch.randn(max(counts), shape[1], device=gpu).to(dtype)
        bias = torch.randn(shape[0], device=gpu).to(dtype) * 0.1
        want, size = weight.expected(x), x.double().abs() @ weight.decoded.abs().T
        for i, tokens in enumerate(counts):
            b = bias if i % 2 else None
            w = want[:tokens] + (0 if b is None else b.double())
            s = size[:tokens] + (0 if b is None else b.double().abs())
            y = weight(x[:tokens], b)
            try:
                assert_close(y, w, s, shape[1], tolerance(gpu_scheme, dtype), dtype)
            except AssertionError as error:
                raise AssertionError(f"{shape} tokens={tokens} bias={b is not None}: {error}") from None
        tried += 1
    assert tried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        IntScheme(bits=4, group_size=128),
        IntScheme(bits=3, group_size=64, symmetric=False),
        IntScheme(bits=2, group_size=32),
        LutScheme(entries=16, group_size=128),
        LutScheme(entries=8, group_size=128),
        TrellisScheme(rate=2),
        TrellisScheme(rate=3),
        TrellisScheme(rate=2.5),
    ],
    ids=str,
)
def test_a_large_weight(
    cuda_kernel: Any, scheme: Scheme, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: torch.device
) -> None:
    """4096 x 4096: all multiprocessors, shares that begin and end in the middle of a row of superblocks."""
    weight = gpu_weight(cuda_kernel, scheme, (4096, 4096))
    x = torch.randn(MOST_TOKENS + 44, 4096, device=gpu).to(dtype)
    want, size = weight.expected(x), x.double().abs() @ weight.decoded.abs().T
    for tokens in (1, 8, 16, 33, 64, 128, 256, 300):
        assert_close(weight(x[:tokens]), want[:tokens], size[:tokens], 4096, TOLERANCE[dtype], dtype)


@pytest.mark.parametrize("tokens", [3, 300])
def test_float32(cuda_kernel: Any, tokens: int, gpu_weight: Callable[..., Any], gpu: torch.device) -> None:
    weight = gpu_weight(cuda_kernel, IntScheme(bits=4, group_size=64), (130, 648))
    x = torch.randn(tokens, 648, device=gpu)
    bias = torch.randn(130, device=gpu)
    want, size = weight.expected(x, bias), x.double().abs() @ weight.decoded.abs().T
    assert_close(weight(x, bias), want, size, 648, TOLERANCE[torch.float32], torch.float32)


def exact_in(scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether operands hold every value of the format's codes; bf16 has 8 bits."""
    if isinstance(scheme, IntScheme):
        return not scheme.progressive
    return dtype == torch.float16 or getattr(scheme, "codec", "") == "float"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_gives_back_every_weight(
    gpu_kernel: Any, gpu_scheme: Scheme, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: torch.device
) -> None:
    """Bit for bit what the codec decodes, rounded once: every weight of a ragged shape, by itself.

    Twice where operands round it too; `progressive` multiplies 127 by scale / 127.
    """
    shape = (77, 203) if getattr(gpu_scheme, "group_size", 0) <= 203 else (77, 267)
    weight = gpu_weight(gpu_kernel, gpu_scheme, shape)
    eye = torch.eye(shape[1], device=gpu).to(dtype)
    counts = (1, 8, 33, 203) if gpu_kernel.name == "cuda" else (203,)
    for tokens in counts:
        got = torch.cat([weight(part) for part in eye.split(tokens)])
        if exact_in(gpu_scheme, dtype):
            assert torch.equal(got, weight.decoded.T.to(dtype)), tokens
        else:
            error = (got.double() - weight.decoded.T).abs()
            assert bool((error <= 2.01 * EPSILON[dtype] * weight.decoded.T.abs()).all()), tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_exact(
    gpu_kernel: Any, bits: int, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: torch.device
) -> None:
    """Sums below 2^24 of whole numbers have one right answer, whatever the order: with any split, in any block."""
    torch.manual_seed(bits)
    shape = (577, 1537)
    scheme = IntScheme(bits=bits, group_size=64, symmetric=False)
    groups = -(-shape[1] // 64)
    scale = (2.0 ** torch.randint(-3, 3, (shape[0], groups))).half()
    weight = gpu_weight(gpu_kernel, scheme, shape, scale=scale)
    counts = TOKENS if gpu_kernel.name == "cuda" else [1, 17, 129]
    x = torch.randint(-4, 5, (max(counts), shape[1]), device=gpu).to(dtype)
    want = weight.expected(x).to(dtype)  # one rounding, of an exact sum
    for tokens in counts:
        assert torch.equal(weight(x[:tokens]), want[:tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_a_tensor_is_read_or_written(
    gpu_kernel: Any,
    gpu_scheme: Scheme,
    dtype: torch.dtype,
    gpu_weight: Callable[..., Any],
    guards: Any,
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN lies before and behind every tensor, and in what is not written yet: one that is read shows in y."""
    from bitpalette.kernels import native_cuda

    monkeypatch.setattr(native_cuda, "_of_stream", {})  # workspace of its own, with guards around it
    shapes = [(123, 577), (130, 648)] if gpu_kernel.name == "cuda" else [(130, 648)]
    for shape in shapes:
        with guards() as g:
            weight = gpu_weight(gpu_kernel, gpu_scheme, shape, g)
            if weight is None:
                continue
            bias = g.copy(torch.randn(shape[0], device=gpu).to(dtype))
            for tokens in (1, 2, 9, 65, 300) if gpu_kernel.name == "cuda" else (9,):
                x = g.copy(torch.randn(tokens, shape[1], device=gpu).to(dtype))
                want, size = weight.expected(x, bias), x.double().abs() @ weight.decoded.abs().T + bias.abs()
                assert_close(weight(x, bias), want, size, shape[1], tolerance(gpu_scheme, dtype), dtype)


def test_rows_of_a_wider_tensor(cuda_kernel: Any, gpu_weight: Callable[..., Any], gpu: torch.device) -> None:
    """x is a view whose rows lie apart, with NaN between them, on 16 bytes and not."""
    for columns, extra in ((648, 8), (648, 24), (577, 7), (640, 3)):
        weight = gpu_weight(cuda_kernel, IntScheme(bits=4, group_size=64), (130, columns))
        for tokens in (1, 9, 300):
            wide = torch.full((tokens, columns + extra), torch.nan, device=gpu, dtype=torch.float16)
            x = wide[:, :columns].copy_(torch.randn(tokens, columns, device=gpu))
            assert torch.equal(weight(x), weight(x.contiguous())), (columns, extra, tokens)
            shifted = wide.view(-1)[1 : 1 + columns][None]  # one row, not on 16 bytes
            shifted.copy_(torch.randn(1, columns, device=gpu))
            assert torch.equal(weight(shifted), weight(shifted.clone()))


def test_what_is_not_finite_reaches_its_token_alone(
    gpu_kernel: Any, gpu_weight: Callable[..., Any], gpu: torch.device
) -> None:
    weight = gpu_weight(gpu_kernel, IntScheme(bits=4, group_size=64), (130, 648))
    clean = torch.randn(9, 648, device=gpu, dtype=torch.float16)
    want = weight(clean)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = clean.clone()
        x[4, 647] = bad
        y = weight(x)
        others = [i for i in range(9) if i != 4]
        assert torch.equal(y[others], want[others])
        nonzero = weight.decoded[:, 647] != 0
        assert not bool(y[4][nonzero].isfinite().any())


def test_no_tokens(gpu_kernel: Any, gpu_weight: Callable[..., Any], gpu: torch.device) -> None:
    weight = gpu_weight(gpu_kernel, IntScheme(bits=4, group_size=64), (130, 648))
    assert weight(torch.empty(0, 648, device=gpu, dtype=torch.float16)).shape == (0, 130)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_magnitudes_of_bf16(cuda_kernel: Any, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: Any) -> None:
    """1e4 a value is more than fp16 sums hold, and nothing to fp32's."""
    weight = gpu_weight(cuda_kernel, IntScheme(bits=4, group_size=128), (130, 648))
    scale = 1e4 if dtype != torch.float16 else 100
    x = (torch.randn(17, 648, device=gpu) * scale).to(dtype)
    want, size = weight.expected(x), x.double().abs() @ weight.decoded.abs().T
    assert_close(weight(x), want, size, 648, TOLERANCE[dtype], dtype)
