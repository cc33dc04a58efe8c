"""csrc/cpu/trellis_linear.h against the torch reference of codec `trellis`: every rate, window and instruction set."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.cpu_trellis import INPUT_FORMS
from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import available_isas, cpu_module, isa_index
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import WINDOWS, TrellisScheme, tile_count

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

PROT_NONE = 0  # of mprotect(2)

ODD = (33, 77)  # one row into a third row of tiles, 13 columns into a fifth tile
LARGEST = {"int8": 127, "exact": 32512}
"""Where these are the largest values of a block, its scale is 1 and its other integers are their own codes."""


class Weight:
    """Random bit strings (all are valid) with scales that are powers of two, so that exact products stay exact."""

    def __init__(self, m: int, window: int, shape: tuple[int, int]) -> None:
        g = torch.Generator().manual_seed(100 * m + window)
        rows, tiles = tile_count(shape)
        self.m, self.window, self.shape = m, window, shape
        self.codes = torch.randint(0, 256, (rows * tiles * 2 * m,), generator=g, dtype=torch.uint8)
        self.scale = torch.exp2(torch.randint(-3, 4, (shape[0],), generator=g)).half()
        self.inputs = torch.randn(9, shape[1], generator=g)

    def integers(self, form: str, tokens: int) -> Tensor:
        """Small integers, and the largest in every block of 256 columns."""
        x = (self.inputs[:tokens] * 20).round().clamp(-127, 127)
        x[:, ::256] = LARGEST[form]
        return x

    def reference(self) -> Tensor:
        scheme = TrellisScheme(rate=self.m / 16, window=self.window)
        return get_codec("trellis").decode(
            QuantizedTensor(scheme, self.shape, {"codes": self.codes, "scale": self.scale})
        )

    def linear(self, isa: str, form: str, x: Tensor, threads: int = 1) -> Tensor:
        native = cpu_module().trellis_weight(
            isa_index(isa),
            INPUT_FORMS[form],
            self.codes.data_ptr(),
            self.scale.data_ptr(),
            *self.shape,
            self.m,
            self.window,
        )
        x = x.contiguous()
        y = torch.full((x.shape[0], self.shape[0]), math.nan)
        cpu_module().linear([native], isa_index(isa), None, x.data_ptr(), 0, x.shape[0], [0], [y.data_ptr()], threads)
        return y

    def decode(self, isa: str, index: Tensor | None = None, threads: int = 1) -> Tensor:
        n = self.shape[0] if index is None else index.shape[0]
        y = torch.full((n, self.shape[1]), math.nan)
        address, scale = 0 if index is None else index.data_ptr(), self.scale.float()
        head = isa_index(isa), self.codes.data_ptr(), scale.data_ptr(), *self.shape, self.m, self.window
        cpu_module().trellis_decode(*head, address, n, y.data_ptr(), threads)
        return y


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("window", WINDOWS)
def test_every_rate(isa: str, window: int) -> None:
    """Integer inputs give integer sums below 2^24: every instruction set must give the same, to the last bit."""
    for m in range(16, 81):
        weight = Weight(m, window, ODD)
        w = weight.reference()
        assert torch.equal(weight.decode(isa), w), f"m={m}"
        for form, most in (("int8", 9), ("exact", 2)):
            x = weight.integers(form, most)
            exact = x.double() @ w.double().T
            for tokens in range(1, most + 1):
                y = weight.linear(isa, form, x[:tokens])
                assert torch.equal(y.double(), exact[:tokens]), f"m={m} {form} tokens={tokens}"
        x = weight.inputs[:2]
        assert relative_error(weight.linear(isa, "float32", x), x.double() @ w.double().T) < 3e-7, f"m={m}"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 123), (16, 16), (33, 577), (48, 4100), (5, 8193)])
def test_awkward_shapes(isa: str, shape: tuple[int, int]) -> None:
    """The last two are wider than the columns that stay in the cache for 16 rows, at 1 and at 8 tokens."""
    for m in (16, 41, 45, 64, 80):
        weight = Weight(m, 16, shape)
        w = weight.reference().double()
        assert torch.equal(weight.decode(isa).double(), w)
        for tokens in (1, 2, 4, 8):
            for form, bound in (("int8", 0.02), ("exact", 1e-4), ("float32", 1e-6)):
                x = weight.inputs[:tokens]
                error = (weight.linear(isa, form, x).double() - x.double() @ w.T).norm()
                assert error < bound * x.norm() * w.norm() / math.sqrt(shape[1]), f"m={m} tokens={tokens} {form}"


@pytest.mark.parametrize("isa", available_isas())
def test_the_largest_sums(isa: str) -> None:
    """State 0 has the lowest level, -510: with the largest inputs no sum may leave the range of 32-bit integers."""
    weight = Weight(40, 16, (16, 512))
    weight.codes.zero_()
    for form, largest in LARGEST.items():
        x = torch.full((3, 512), float(largest))
        x[1] = -x[1]
        exact = x.double() @ weight.reference().double().T
        for tokens in (1, 3):
            assert relative_error(weight.linear(isa, form, x[:tokens]), exact[:tokens]) < 1e-6, form


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-36, 1e-30, 1.0, 1e30, 1e34])
def test_floats_of_any_magnitude(isa: str, size: float) -> None:
    weight = Weight(40, 16, (16, 300))
    x = weight.inputs[:2] * size
    x[:, 256:] *= 1e-3
    w = weight.reference().double()
    exact = x.double() @ w.T
    error = (weight.linear(isa, "float32", x).double() - exact).norm()
    assert error <= 3e-7 * exact.norm() + 2.0**-126 * math.sqrt(x.numel()) * w.norm()


@pytest.mark.parametrize("isa", available_isas())
def test_rows_in_any_order(isa: str) -> None:
    weight = Weight(37, 14, ODD)
    index = torch.tensor([32, 15, 15, 0, 31, 16, 14])
    assert torch.equal(weight.decode(isa, index), weight.reference()[index])
    assert weight.decode(isa, index[:0]).shape == (0, 77)


@pytest.mark.parametrize("isa", available_isas())
def test_threads_do_not_change_a_bit(isa: str) -> None:
    for m in (24, 79):
        weight = Weight(m, 16, (257, 600))  # 154 K weights, which are worth two threads
        for form in INPUT_FORMS:
            for tokens in (1, 3, 9):
                x = weight.inputs[:tokens]
                alone = weight.linear(isa, form, x)
                for threads in (0, 2, 3):
                    assert torch.equal(weight.linear(isa, form, x, threads), alone)
        assert torch.equal(weight.decode(isa, threads=2), weight.decode(isa))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_where_it_is(isa: str, bad: float) -> None:
    weight = Weight(40, 16, ODD)
    for form in INPUT_FORMS:
        for column in (0, 5, 76):
            x = weight.inputs[:3].clone()
            x[1, column] = bad
            y = weight.linear(isa, form, x)
            assert not bool(y[1].isfinite().any())
            assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("isa", available_isas())
def test_nothing_is_read_beside_the_codes(isa: str) -> None:
    """Codes between two pages that must not be read, at either end: a read beyond them ends the process."""
    page = mmap.PAGESIZE
    for m in (16, 17, 32, 33, 44, 45, 48, 64, 65, 80):
        weight = Weight(m, 16, (5, 29))
        y = weight.linear(isa, "int8", weight.inputs)
        whole = mmap.mmap(-1, 3 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        middle = torch.frombuffer(whole, dtype=torch.uint8)[page : 2 * page]
        codes, n = weight.codes, weight.codes.numel()
        mprotect = ctypes.CDLL(None).mprotect
        for guard in (base, base + 2 * page):
            assert mprotect(ctypes.c_void_p(guard), page, PROT_NONE) == 0
        for place in (middle[:n], middle[-n:]):
            weight.codes = place.copy_(codes)
            assert torch.equal(weight.linear(isa, "int8", weight.inputs), y)
            weight.decode(isa)


def test_refusals() -> None:
    t = torch.zeros(4096)
    a = t.data_ptr()

    def call(isa: int = 0, form: int = 2, out: int = 16, n: int = 16, m: int = 32, window: int = 16) -> None:
        cpu_module().trellis_weight(isa, form, a, a, out, n, m, window)

    call()
    for values, message in (
        ({"m": 15}, "15 bits for 16 weights, not 16 to 80"),
        ({"m": 81}, "81 bits for 16 weights"),
        ({"window": 13}, "a window of 13 bits, not 12, 14 or 16"),
        ({"out": 0}, r"a weight \[0, 16\]"),
        ({"n": -1}, r"a weight \[16, -1\]"),
        ({"isa": 9}, "no instruction set 9"),
        ({"form": 1}, "not int8 by 32"),
        ({"form": 4}, "no form of inputs 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**values)
    weight = Weight(32, 16, ODD)
    for row in (-1, 33):
        with pytest.raises(ValueError, match=f"row {row} of 33"):
            weight.decode("scalar", torch.tensor([row]))
