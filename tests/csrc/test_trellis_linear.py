"""csrc/cpu/trellis_linear.h against the torch reference of codec `trellis`: every rate, window and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import available_isas, cpu_module, isa_index
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import WINDOWS, TrellisScheme, tile_count

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

ODD = (33, 77)  # one row into a third row of tiles, 13 columns into a fifth tile


class Weight:
    """Random bit strings (all are valid) with scales, as the native calls take them."""

    def __init__(self, m: int, window: int, shape: tuple[int, int]) -> None:
        g = torch.Generator().manual_seed(100 * m + window)
        rows, tiles = tile_count(shape)
        self.m, self.window, self.shape = m, window, shape
        self.codes = torch.randint(0, 256, (rows * tiles * 2 * m,), generator=g, dtype=torch.uint8)
        self.scale = (torch.rand(shape[0], generator=g) + 0.01).half().float()
        self.inputs = torch.randn(9, shape[1], generator=g)

    def reference(self) -> Tensor:
        scheme = TrellisScheme(rate=self.m / 16, window=self.window)
        fields = {"codes": self.codes, "scale": self.scale.half()}
        return get_codec("trellis").decode(QuantizedTensor(scheme, self.shape, fields))

    def linear(self, isa: str, x: Tensor, threads: int = 1) -> Tensor:
        y = torch.full((x.shape[0], self.shape[0]), math.nan)
        cpu_module().trellis_linear(*self._head(isa), x.data_ptr(), x.shape[0], y.data_ptr(), threads)
        return y

    def decode(self, isa: str, index: Tensor | None = None, threads: int = 1) -> Tensor:
        n = self.shape[0] if index is None else index.shape[0]
        y = torch.full((n, self.shape[1]), math.nan)
        address = 0 if index is None else index.data_ptr()
        cpu_module().trellis_decode(*self._head(isa), address, n, y.data_ptr(), threads)
        return y

    def _head(self, isa: str) -> tuple[int, ...]:
        return isa_index(isa), self.codes.data_ptr(), self.scale.data_ptr(), *self.shape, self.m, self.window


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("window", WINDOWS)
def test_every_rate(isa: str, window: int) -> None:
    for m in range(16, 81):
        weight = Weight(m, window, ODD)
        w = weight.reference()
        assert torch.equal(weight.decode(isa), w), f"m={m}"
        exact = weight.inputs.double() @ w.double().T
        for tokens in range(1, 10):
            y = weight.linear(isa, weight.inputs[:tokens])
            error = (y.double() - exact[:tokens]).norm() / exact[:tokens].norm()
            assert error < 1e-6, f"m={m} tokens={tokens}: {error:.2e}"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 123), (16, 16), (33, 577), (48, 4100), (5, 8193)])
def test_awkward_shapes(isa: str, shape: tuple[int, int]) -> None:
    """The last two are wider than the block of columns whose inputs are kept in the cache, at 1 and at 8 tokens."""
    for m in (16, 41, 80):
        weight = Weight(m, 16, shape)
        w = weight.reference()
        assert torch.equal(weight.decode(isa), w)
        for tokens in (1, 2, 8):
            x = weight.inputs[:tokens]
            error = (weight.linear(isa, x).double() - x.double() @ w.double().T).norm()
            assert error < 1e-6 * x.norm() * w.norm() / math.sqrt(shape[1]), f"m={m} tokens={tokens}"


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
        for tokens in (1, 3, 9):
            x = weight.inputs[:tokens]
            alone = weight.linear(isa, x)
            for threads in (0, 2, 3):
                assert torch.equal(weight.linear(isa, x, threads), alone)
        assert torch.equal(weight.decode(isa, threads=2), weight.decode(isa))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_where_it_is(isa: str, bad: float) -> None:
    """Token 1 begins in memory where the columns that fill up token 0's last tile would be."""
    weight = Weight(40, 16, ODD)
    for column in (0, 5, 76):
        x = weight.inputs[:3].clone()
        x[1, column] = bad
        y = weight.linear(isa, x)
        assert not bool(y[1].isfinite().any())
        assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("isa", available_isas())
def test_inputs_at_any_address(isa: str) -> None:
    weight = Weight(64, 16, (40, 96))
    shifted = torch.empty(3 * 96 + 1)[1:].view(3, 96).copy_(weight.inputs[:3])
    assert torch.equal(weight.linear(isa, shifted), weight.linear(isa, weight.inputs[:3]))


def test_refusals() -> None:
    t = torch.zeros(4096)
    a = t.data_ptr()

    def call(isa: int = 0, out: int = 16, n: int = 16, m: int = 32, window: int = 16) -> None:
        cpu_module().trellis_linear(isa, a, a, out, n, m, window, a, 1, a, 1)

    call()
    for values, message in (
        ({"m": 15}, "15 bits for 16 weights, not 16 to 80"),
        ({"m": 81}, "81 bits for 16 weights"),
        ({"window": 13}, "a window of 13 bits, not 12, 14 or 16"),
        ({"out": 0}, r"a weight \[0, 16\]"),
        ({"n": -1}, r"a weight \[16, -1\]"),
        ({"isa": 9}, "no instruction set 9"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**values)
    weight = Weight(32, 16, ODD)
    for row in (-1, 33):
        with pytest.raises(ValueError, match=f"row {row} of 33"):
            weight.decode("scalar", torch.tensor([row]))
