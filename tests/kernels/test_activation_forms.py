"""Native kernels of codecs int and lut with int8, exact and float32 inputs, on every instruction set."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.activation_form import ACTIVATIONS_VARIABLE, activation_form
from bitpalette.kernels.base import KernelError
from bitpalette.kernels.cpu_int import CpuIntKernel
from bitpalette.kernels.cpu_int8 import CpuInt8Kernel
from bitpalette.kernels.cpu_lut import CpuLutKernel, table_bytes
from bitpalette.kernels.native_linear import NativeLinear
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import get_codec, group_count
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.native import available_isas
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, field_specs

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

SHAPES = [(1, 17), (17, 1537), (123, 576), (35, 123)]
TOKENS = (1, 2, 3, 8, 9, 32)

INTS = [
    IntScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in range(1, 9)
    for group_size in (0, 32, 96)
    for symmetric in (True, False)
]
LUTS = [
    LutScheme(entries=entries, table="kmeans", table_scope=scope, group_size=group_size, scaled=scaled)
    for entries in (4, 6, 11, 16)
    for scope in ("tensor", "row")
    for group_size, scaled in ((0, False), (0, True), (32, True))
]


def random_tensor(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    """Fields of random bits: every code, zero point and level is as likely as another."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{scheme} {shape}".encode()))
    specs, fields = field_specs(scheme, shape), {}
    entries = scheme.entries if isinstance(scheme, LutScheme) else 1 << scheme.bits  # type: ignore[attr-defined]
    bits = scheme.bits  # type: ignore[attr-defined]
    fields["codes"] = pack_bits(torch.randint(0, entries, shape, generator=g, dtype=torch.uint8), bits).flatten()
    if "scale" in specs:
        fields["scale"] = (torch.randn(specs["scale"][0], generator=g) * 0.05).half()
    if "zero_point" in specs:
        groups = group_count(shape[1], scheme.group_size)  # type: ignore[attr-defined]
        zeros = torch.randint(0, 1 << bits, (shape[0], groups), generator=g, dtype=torch.uint8)
        fields["zero_point"] = pack_bits(zeros, bits)
    if "table" in specs:
        fields["table"] = torch.randn(specs["table"][0], generator=g).sort(-1).values.half()
    return QuantizedTensor(scheme, shape, fields)


def check(kernel: NativeLinear, scheme: Scheme, allowed: float) -> None:
    for shape in SHAPES:
        if scheme.group_size > shape[1]:  # type: ignore[attr-defined]
            continue
        qt = random_tensor(scheme, shape)
        w, packed = get_codec(scheme.codec).decode(qt).double(), kernel.prepare(qt)
        x = torch.randn(max(TOKENS), shape[1], generator=torch.Generator().manual_seed(7))
        assert torch.equal(kernel.rows(packed, torch.arange(shape[0])).double(), w)
        for tokens in TOKENS:
            y = kernel.linear(x[:tokens], packed, None)
            error = (y.double() - x[:tokens].double() @ w.T).norm()
            # of the norm that the sum of the products' magnitudes has: weights that cancel are not asked for more
            norm = x[:tokens].double().norm() * w.norm() / shape[1] ** 0.5
            assert error <= allowed * norm, f"{shape} tokens={tokens}: {float(error / norm):.2e}"


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


# two planes: half a step of 1 / 32512 of the largest of 256; float32: rounding of sums of up to 1537 products, of codes
# up to 255 with a zero point anywhere
@pytest.mark.parametrize(("form", "allowed"), [("int8", 0.02), ("exact", 1e-4), ("float32", 1e-5)])
@pytest.mark.parametrize("scheme", [*INTS, *LUTS], ids=str)
def test_every_form(isa: str, form: str, allowed: float, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    kernel = CpuIntKernel(isa) if isinstance(scheme, IntScheme) else CpuLutKernel(isa)
    check(kernel, scheme, allowed)
    if scheme == IntScheme(bits=8):
        check(CpuInt8Kernel(isa), scheme, allowed)


def whole_numbers(shape: tuple[int, int], pattern: str) -> Tensor:
    """Inputs whose int8 codes are themselves: 127 is the largest of each 32 columns."""
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).float()
    if pattern == "largest":
        x = x.sign() * 127
    x[:, ::32] = 127
    return x


@pytest.mark.parametrize("form", ["int8", "exact"])
@pytest.mark.parametrize("pattern", ["any", "largest"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [CpuIntKernel, CpuInt8Kernel])
def test_integer_sums_are_exact(
    isa: str, form: str, pattern: str, bits: int, make: Callable[[str], NativeLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of one and sums that float32 holds: what saturates or drops a product shows."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    for symmetric in (True, False):
        scheme, shape = IntScheme(bits=bits, symmetric=symmetric), (19, 256)
        kernel = make(isa)
        if kernel.why_not(scheme, shape, torch.device("cpu")) is not None:
            continue
        for codes in (torch.full(shape, (1 << bits) - 1), torch.arange(shape[1]).expand(shape) % (1 << bits)):
            fields = {
                "codes": pack_bits(codes.to(torch.uint8).contiguous(), bits).flatten(),
                "scale": torch.ones(shape[0], 1).half(),
            }
            if not symmetric:
                fields["zero_point"] = pack_bits((torch.arange(shape[0])[:, None] % (1 << bits)).to(torch.uint8), bits)
            qt = QuantizedTensor(scheme, shape, fields)
            x = whole_numbers((5, shape[1]), pattern)
            y = kernel.linear(x, kernel.prepare(qt), None)
            assert torch.equal(y, x @ get_codec("int").decode(qt).T)


@pytest.mark.parametrize("entries", [4, 8, 16])
@pytest.mark.parametrize("table", ["nf4", "lloyd", "kmeans"])
def test_tables_in_bytes_are_as_close_as_int8_inputs(entries: int, table: str) -> None:
    """Each of the two roundings alone gives an error of about half a percent."""
    if table == "nf4" and entries != 16:
        pytest.skip("nf4 has 16 entries")
    torch.manual_seed(2)
    scheme = LutScheme(entries=entries, table=table, table_scope="row" if table == "kmeans" else "tensor")
    qt = quantize_tensor(torch.randn(64, 1024), scheme)
    kernel, x = CpuLutKernel(), torch.randn(8, 1024)
    exact = x @ get_codec("lut").decode(qt).T
    error = (kernel.linear(x, kernel.prepare(qt), None) - exact).norm() / exact.norm()
    assert error <= 0.008


def test_bytes_of_a_table() -> None:
    table = torch.tensor([[-1.0, -0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1, 2, 3, 127]]).half()
    codes, unit = table_bytes(table)
    assert codes.shape == (1, 1, 16, 4) and unit.shape == (1, 16)
    back = (codes[0, 0, :3].float() - 128) * unit[0, :3, None]
    assert torch.allclose(back, table.float(), atol=0.002) and torch.equal(back[1:], table[1:].float())
    assert codes[0, 0, 3:].eq(128).all() and unit[0, 3:].count_nonzero() == 0
    one, unit = table_bytes(table[0])
    assert one.shape == (16,) and unit.shape == (1,) and one[4:].eq(128).all()


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ACTIVATIONS_VARIABLE, raising=False)
    assert activation_form() == "int8"
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "int3")
    with pytest.raises(KernelError, match=r"BITPALETTE_CPU_ACTIVATIONS=int3 is no form of activations; use .*float32"):
        activation_form()
