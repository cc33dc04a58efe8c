"""Native multiplication with many tokens (csrc/cpu/panel_gemm.h): every codec, form of inputs and instruction set."""

from __future__ import annotations

import ctypes
import math
import mmap
import zlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernels.activation_form import ACTIVATIONS_VARIABLE
from bitpalette.kernels.base import Packed
from bitpalette.kernels.cpu_int import CpuIntKernel
from bitpalette.kernels.cpu_int8 import CpuInt8Kernel
from bitpalette.kernels.cpu_lut import CpuLutKernel
from bitpalette.kernels.cpu_trellis import CpuTrellisKernel
from bitpalette.kernels.native_linear import NativeLinear, native_linear
from bitpalette.quant.codec import get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.native import available_isas
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import TrellisScheme

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

FORMS = {"int8": 0.012, "exact": 1e-4, "float32": 1e-5}
"""Error relative to that of random signs; int8: a step of 1/127 of the largest of 128 or 256 normal values."""

SHAPES = [(1, 17), (17, 1537), (33, 160), (35, 123), (48, 64)]
TOKENS = (9, 33, 65)

SCHEMES: list[Scheme] = [
    *(IntScheme(bits=bits, group_size=32, symmetric=symmetric) for bits in range(1, 9) for symmetric in (True, False)),
    *(IntScheme(bits=bits, group_size=size) for bits in (4, 8) for size in (0, 64, 96, 128, 160)),
    LutScheme(entries=16, group_size=32),
    LutScheme(entries=6, table="kmeans", table_scope="row"),
    LutScheme(entries=16, table="kmeans", table_scope="row", scaled=False),
    *(TrellisScheme(rate=m / 16, window=window) for m, window in ((16, 12), (33, 16), (45, 14), (80, 16))),
]


def kernels_of(scheme: Scheme, isa: str) -> Iterator[NativeLinear]:
    kinds = {"int": [CpuIntKernel, CpuInt8Kernel], "lut": [CpuLutKernel], "trellis": [CpuTrellisKernel]}
    for kind in kinds[scheme.codec]:
        kernel: NativeLinear = kind(isa)
        if kernel.why_not(scheme, (64, 64), torch.device("cpu")) is None:  # type: ignore[attr-defined]
            yield kernel


def weight(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    return random_weight(scheme, shape, torch.Generator().manual_seed(zlib.crc32(f"{scheme} {shape}".encode())))


def inputs(tokens: int, n: int) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_against_the_codec(isa: str, form: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a token's output does not depend on the others: it is the same in a block of 9 as of 12, to the last bit."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    for shape in SHAPES:
        if getattr(scheme, "group_size", 0) > shape[1]:
            continue
        qt = weight(scheme, shape)
        w, x = get_codec(scheme.codec).decode(qt).double(), inputs(max(TOKENS), shape[1])
        for kernel in kernels_of(scheme, isa):
            packed, known = kernel.prepare(qt), None  # type: ignore[attr-defined]
            for tokens in sorted(TOKENS, reverse=True):
                y = kernel.linear(x[:tokens], packed, None)
                error = (y.double() - x[:tokens].double() @ w.T).norm()
                norm = x[:tokens].double().norm() * w.norm() / math.sqrt(shape[1])
                assert error <= FORMS[form] * norm, f"{kernel.name} {shape} {tokens}: {float(error / norm):.2e}"
                if tokens > 32:  # below, codec int has kernels for rows with some instruction sets
                    known = y if known is None else known
                    assert torch.equal(y, known[:tokens]), f"{kernel.name} {shape} {tokens}"


@pytest.mark.parametrize("form", ["int8", "exact"])
@pytest.mark.parametrize(
    "scheme", [IntScheme(bits=b, symmetric=s) for b in (1, 4, 5, 6, 8) for s in (True, False)], ids=str
)
def test_largest_sums(isa: str, form: str, scheme: IntScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are their own codes, all as large as they get: what saturates or overflows shows."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    qt = weight(scheme, (19, 256))
    qt.fields["codes"].fill_(0xFF)
    qt.fields["scale"].fill_(1.0)
    x = torch.full((33, 256), 127.0)
    x[1::2] *= -1
    x[2, 1::2] *= -1
    exact = x.double() @ get_codec("int").decode(qt).double().T
    for kernel in kernels_of(scheme, isa):
        y = kernel.linear(x, kernel.prepare(qt), None)  # type: ignore[attr-defined]
        assert (y.double() - exact).abs().max() <= 2e-7 * exact.abs().max()


def test_largest_levels_of_a_trellis(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State 0 has the lowest level, -510: 256 columns of 32512 times that are more than 32 bits."""
    qt = weight(TrellisScheme(rate=2.5), (16, 512))
    qt.fields["codes"].zero_()
    qt.fields["scale"].fill_(1.0)
    x = torch.full((9, 512), 1.0)
    x[1] = -1
    exact = x.double() @ get_codec("trellis").decode(qt).double().T
    for form in FORMS:
        monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
        kernel = CpuTrellisKernel(isa)
        error = (kernel.linear(x, kernel.prepare(qt), None).double() - exact).norm()
        assert error <= 1e-6 * exact.norm(), form


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("scheme", [SCHEMES[6], SCHEMES[-1], LutScheme(entries=16, group_size=64)], ids=str)
def test_threads_do_not_change_a_bit(isa: str, scheme: Scheme, tokens: int) -> None:
    """131 blocks of 16 rows, an odd number: tiles of two blocks end within the last, four streams leave three over."""
    qt, x = weight(scheme, (2090, 96)), inputs(tokens, 96)
    expected = x.double() @ get_codec(scheme.codec).decode(qt).double().T
    before = torch.get_num_threads()
    for kernel in kernels_of(scheme, isa):
        packed = kernel.prepare(qt)  # type: ignore[attr-defined]
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel.linear(x, packed, None))
        finally:
            torch.set_num_threads(before)
        assert (results[0].double() - expected).norm() <= 0.02 * expected.norm()
        assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tokens_than_are_kept_at_once(isa: str, dtype: torch.dtype) -> None:
    """1100 rows of x go by 512 at a time, with the bias, each to its own rows of y."""
    kernel, scheme = CpuIntKernel(isa), IntScheme(bits=4, group_size=32)
    packed = kernel.prepare(weight(scheme, (40, 64)))
    x, bias = inputs(1100, 64).to(dtype), torch.randn(40).to(dtype)
    y = kernel.linear(x, packed, bias)
    for start, stop in ((0, 512), (512, 1024), (1024, 1100)):
        assert torch.equal(y[start:stop], kernel.linear(x[start:stop], packed, bias))


def test_weights_of_all_kinds_share_an_input(isa: str) -> None:
    """One call for weights that want the input in different forms, orders and spans; two of them in the same."""
    schemes = [IntScheme(bits=4, group_size=32), TrellisScheme(rate=2.0, window=12), IntScheme(bits=4, group_size=32)]
    schemes += [LutScheme(entries=16), IntScheme(bits=8)]
    weights, kept, alone, x = [], list[Packed](), [], inputs(37, 160)
    for i, scheme in enumerate(schemes):
        kernel = next(kernels_of(scheme, isa))
        packed = kernel.prepare(weight(scheme, (20 + 16 * i, 160)))  # type: ignore[attr-defined]
        kept.append(packed)
        weights.append(kernel.native(packed))
        alone.append(kernel.linear(x, packed, None))
    y = [torch.full_like(a, math.nan) for a in alone]
    native_linear(weights, kernel.resolve_isa(), None, x, [None] * len(y), y)
    for together, single in zip(y, alone, strict=True):
        assert torch.equal(together, single)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", [SCHEMES[6], SCHEMES[7], SCHEMES[-1], LutScheme(entries=16)], ids=str)
def test_what_is_not_finite_stays_visible_and_where_it_is(isa: str, scheme: Scheme, bad: float) -> None:
    x = inputs(34, 160)
    x[5, 150] = bad
    good = torch.arange(34) != 5
    for kernel in kernels_of(scheme, isa):
        y = kernel.linear(x, kernel.prepare(weight(scheme, (40, 160))), None)  # type: ignore[attr-defined]
        assert not bool(y[5].isfinite().any()) and bool(y[good].isfinite().all())


@pytest.mark.parametrize("shape", [(5, 29), (16, 64), (35, 70)])
@pytest.mark.parametrize("scheme", [IntScheme(bits=4), IntScheme(bits=8), TrellisScheme(rate=2.8125)], ids=str)
def test_nothing_is_read_beside_the_codes(isa: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Codes between two pages that must not be read, at either end: a read beyond them ends the process."""
    page, x = mmap.PAGESIZE, inputs(33, shape[1])
    for kernel in kernels_of(scheme, isa):
        packed = kernel.prepare(weight(scheme, shape))  # type: ignore[attr-defined]
        y, codes = kernel.linear(x, packed, None), packed.tensors["codes"].flatten()
        pages = -(-codes.numel() // page)
        whole = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        middle = torch.frombuffer(whole, dtype=torch.uint8)[page : (pages + 1) * page]
        for guard in (base, base + (pages + 1) * page):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
        for place in (middle[: codes.numel()], middle[-codes.numel() :]):
            moved = Packed(packed.scheme, packed.shape, {**packed.tensors, "codes": place.copy_(codes)})
            assert torch.equal(kernel.linear(x, moved, None), y)
