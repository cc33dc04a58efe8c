"""csrc/cpu/activations.h and input_transform.h: every instruction set against torch, and against one another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitpalette.quant.hartley import hartley_hadamard
from bitpalette.quant.native import DTYPES, available_isas, cpu_module, isa_index

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

each_isa = pytest.mark.parametrize("isa", available_isas())
# odd parts 1, 3, 5, 7, 9, 11, 17, 19, 25, 35, 43, 123, 577, with powers of two below, at and above a vector's width
WIDTHS = [1, 2, 3, 4, 7, 8, 12, 16, 17, 20, 32, 48, 64, 72, 88, 100, 123, 128, 246, 512, 576, 577, 896, 1120, 1536]
WIDE = [1600, 2048, 4864, 8192, 11008, 32768]
CODES, FINE, PLANES = 1, 2, 3
BLOCK = {CODES: 32, FINE: 256, PLANES: 256}


class Steps:
    """A native transform and what it must compute, in float64."""

    def __init__(self, isa: str, n: int, steps: str) -> None:
        self.native = cpu_module().InputTransform(isa_index(isa), n)
        self.n, self.steps = n, []
        g = torch.Generator().manual_seed(n)
        for step in steps:
            if step == "m":
                factors = (torch.rand(n, generator=g) + 0.5) * (torch.randint(0, 2, (n,), generator=g) * 2 - 1)
                self.native.add_multiply(factors.data_ptr())
                self.steps.append(factors.double())
            elif step == "g":
                order = torch.randperm(n, generator=g)
                self.native.add_gather(order.data_ptr())
                self.steps.append(order)
            else:
                self.native.add_rotate()
                self.steps.append(None)

    def reference(self, x: Tensor) -> Tensor:
        x = x.double()
        for step in self.steps:
            if step is None:
                x = hartley_hadamard(x.float()).double()
            else:
                x = x * step if step.is_floating_point() else x[:, step]
        return x

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        y = torch.full_like(x, math.nan)
        self.native.apply(x.data_ptr(), y.data_ptr(), x.shape[0], threads)
        return y


def random_input(tokens: int, n: int) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(n + tokens))


def forms(isa: str, x: Tensor, form: int, transform: Steps | None = None, threads: int = 1) -> tuple[Tensor, ...]:
    """(values, codes, low, scale, sum) of x as kernels read it."""
    tokens, n = x.shape
    row = -(-n // 256) * 256
    input = cpu_module().Activations(isa_index(isa))
    input.set(x.data_ptr(), DTYPES[x.dtype], tokens, n, transform and transform.native, threads)
    values = torch.full((tokens, row), math.nan)
    input.floats(values.data_ptr())
    codes, low = (torch.full((tokens, row), 99, dtype=torch.int8) for _ in range(2))
    scale = torch.full((tokens, row // BLOCK[form]), math.nan)
    total = torch.full(scale.shape, -1, dtype=torch.int32)
    input.quantized(form, codes.data_ptr(), low.data_ptr(), scale.data_ptr(), total.data_ptr(), threads)
    return values, codes, low, scale, total


@each_isa
@pytest.mark.parametrize("steps", ["m", "g", "r", "mr", "mrg", "gm", "mrgmr", "gg"])
def test_transforms(isa: str, steps: str) -> None:
    for n in WIDTHS + (WIDE if steps == "mrg" else []):
        transform, x = Steps(isa, n, steps), random_input(3, n)
        reference = transform.reference(x)
        error = (transform(x).double() - reference).abs().max()
        assert error <= 1e-6 * math.sqrt(n) * max(1.0, float(reference.abs().max())), f"n={n}: {error:.2e}"
        if "r" not in steps:
            assert error <= 1e-6 * float(reference.abs().max()), f"n={n}"


@each_isa
def test_a_transform_in_place_and_by_threads(isa: str) -> None:
    for n in (100, 576):
        transform, x = Steps(isa, n, "mrg"), random_input(70, n)
        y = transform(x)
        assert torch.equal(transform(x, 2), y) and torch.equal(transform(x[5:6]), y[5:6])
        transform.native.apply(x.data_ptr(), x.data_ptr(), 70, 3)
        assert torch.equal(x, y)


@each_isa
def test_what_is_no_transform(isa: str) -> None:
    native = cpu_module().InputTransform
    with pytest.raises(ValueError, match="a transform of 0 columns"):
        native(isa_index(isa), 0)
    with pytest.raises(ValueError, match="2062 columns, whose odd part 1031 is above 1024"):
        native(isa_index(isa), 2062).add_rotate()
    for order in ([0, 1, 1], [0, 1, 3], [-1, 1, 2]):
        with pytest.raises(ValueError, match="the order of 3 columns is no permutation"):
            native(isa_index(isa), 3).add_gather(torch.tensor(order).data_ptr())
    input, x = cpu_module().Activations(isa_index(isa)), torch.randn(1, 4)
    with pytest.raises(ValueError, match="a transform of 3 columns, an input of 4"):
        input.set(x.data_ptr(), 0, 1, 4, native(isa_index(isa), 3), 1)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_read_as_they_are(isa: str, dtype: torch.dtype) -> None:
    for n in (1, 15, 17, 31, 256, 300):
        x = random_input(3, n).to(dtype)
        values = forms(isa, x, CODES)[0]
        assert torch.equal(values[:, :n], x.float()) and not bool(values[:, n:].any())
        transform = Steps(isa, n, "mr")
        error = (forms(isa, x, CODES, transform)[0][:, :n].double() - transform.reference(x)).abs().max()
        assert error <= 1e-5


@each_isa
def test_every_sixteen_bit_value(isa: str) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[None]
        values = forms(isa, x, CODES)[0]
        assert torch.equal(values.isnan(), x.float().isnan())
        assert torch.equal(values.nan_to_num(7.0), x.float().nan_to_num(7.0))


def quantized(x: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """(whole codes int32, scale, sum) by the definition in activations.h; torch rounds to nearest even."""
    blocks = x.view(x.shape[0], -1, BLOCK[form])
    largest = blocks.abs().amax(-1)
    units = 127 * 256 if form == PLANES else 127
    codes = (blocks * torch.full_like(largest, units).div(largest)[..., None]).round().nan_to_num(0.0).to(torch.int32)
    return codes.view(x.shape), largest / 127, codes.sum(-1, dtype=torch.int32)


@each_isa
@pytest.mark.parametrize("form", BLOCK)
def test_codes(isa: str, form: int) -> None:
    for n in (1, 31, 32, 256, 300, 576, 1536):
        x = torch.nn.functional.pad(random_input(5, n) * torch.logspace(-30, 30, 5)[:, None], (0, -n % 256))
        _, codes, low, scale, total = forms(isa, x[:, :n].contiguous(), form)
        whole = codes.int() * 256 + low.int() if form == PLANES else codes.int()
        expected = quantized(x, form)
        for got, want in zip((whole, scale, total), expected, strict=True):
            assert torch.equal(got, want), f"n={n}"


@each_isa
@pytest.mark.parametrize("form", BLOCK)
def test_ties_go_to_even(isa: str, form: int) -> None:
    units = 127 * 256 if form == PLANES else 127
    x = torch.zeros(1, 256)
    x[0, :8] = torch.tensor([units, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -units])
    _, codes, low, *_ = forms(isa, x, form)
    whole = codes.int() * 256 + low.int() if form == PLANES else codes.int()
    assert whole[0, :8].tolist() == [units, 0, 2, 2, 0, -2, -2, -units]


@each_isa
@pytest.mark.parametrize("form", BLOCK)
def test_blocks_that_are_not_finite_or_vanish(isa: str, form: int) -> None:
    x = torch.ones(4, 512)
    x[0, 3], x[1, 3], x[2] = math.inf, math.nan, 1e-39
    x[3] = 3.4e38
    _, codes, low, scale, total = forms(isa, x, form)
    assert bool(scale[:2, 0].isnan().all()) and not bool(scale[:2, 1:].isnan().any())
    first = BLOCK[form]
    assert not bool(codes[:2, :first].any()) and not bool(total[:2, 0].any())
    assert not bool(scale[2].any()) and not bool(codes[2].any())
    assert bool((codes[3] == 127).all()) and bool(scale[3].isfinite().all())
    if form == PLANES:
        assert not bool(low[:2, :first].any()) and not bool(low[2:].any())


@each_isa
@pytest.mark.parametrize("form", BLOCK)
def test_the_codes_of_all_instruction_sets_are_one_function(isa: str, form: int) -> None:
    """Of the same float32 values, bit for bit."""
    x = random_input(9, 777)
    for got, want in zip(forms(isa, x, form), forms("scalar", x, form), strict=True):
        assert torch.equal(got, want)


@each_isa
def test_threads_do_not_change_a_bit(isa: str) -> None:
    transform, x = Steps(isa, 1120, "mrg"), random_input(33, 1120).bfloat16()
    for form in BLOCK:
        for got, want in zip(forms(isa, x, form, transform, 3), forms(isa, x, form, transform), strict=True):
            assert torch.equal(got, want)


@each_isa
def test_buffers_of_a_wider_input_do_not_show(isa: str) -> None:
    input = cpu_module().Activations(isa_index(isa))
    for n in (2000, 40, 600, 3):
        x = torch.full((2, n), 5.0)
        input.set(x.data_ptr(), 0, 2, n, None, 1)
        row = -(-n // 256) * 256
        values, codes = torch.empty(2, row), torch.empty(2, row, dtype=torch.int8)
        scale, total = torch.empty(2, row // 32), torch.empty(2, row // 32, dtype=torch.int32)
        input.floats(values.data_ptr())
        input.quantized(CODES, codes.data_ptr(), 0, scale.data_ptr(), total.data_ptr(), 1)
        assert bool((values[:, :n] == 5).all()) and not bool(values[:, n:].any())
        assert bool((codes[:, :n] == 127).all()) and not bool(codes[:, n:].any())


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype, biased: bool) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (3, 4099), generator=torch.Generator().manual_seed(1))
    outputs = bits.to(torch.int32).view(torch.float32).clone()  # all exponents, infinities and NaN
    outputs[0, :8] = torch.tensor(
        [65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5, -0.0, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 6e-5]
    )
    bias = torch.randn(4099, generator=torch.Generator().manual_seed(2)).to(dtype) if biased else None
    y = torch.empty(3, 4099, dtype=dtype)
    cpu_module().store_outputs(
        isa_index(isa), outputs.data_ptr(), 3, 4099, 0 if bias is None else bias.data_ptr(), DTYPES[dtype], y.data_ptr()
    )
    expected = (outputs if bias is None else outputs + bias.float()).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
