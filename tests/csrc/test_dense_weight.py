"""csrc/cpu/dense_weight.h against torch in float64: types, awkward shapes, numbers of tokens, instruction sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.native_linear import native_linear
from bitpalette.quant.native import DTYPES, available_isas, cpu_module, isa_index

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")


def dense(isa: str, w: Tensor) -> Any:
    return cpu_module().DenseWeight(isa_index(isa), w.data_ptr(), DTYPES[w.dtype], *w.shape)


def linear(isa: str, w: Tensor, x: Tensor) -> Tensor:
    y = torch.full((x.shape[0], w.shape[0]), math.nan, dtype=x.dtype)
    native_linear([dense(isa, w)], isa_index(isa), None, x, [None], [y])
    return y


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 123), (16, 64), (33, 576), (5, 1537)])
def test_every_shape_and_number_of_tokens(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(sum(shape))
    w, inputs = torch.randn(shape, generator=g).to(dtype), torch.randn(9, shape[1], generator=g)
    exact = inputs.double() @ w.double().T
    bound = 2e-6 * inputs.norm() * w.float().norm() / math.sqrt(shape[1])
    for tokens in range(1, 10):
        assert (linear(isa, w, inputs[:tokens]).double() - exact[:tokens]).norm() <= bound, f"{tokens} tokens"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_weight_itself(isa: str, dtype: torch.dtype) -> None:
    """Every bit pattern of 16 bits that is a number, infinities and subnormals too."""
    if dtype == torch.float32:
        w = torch.randn(64, 1027, generator=torch.Generator().manual_seed(1))
    else:
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        w = every[~every.isnan()][:63488].view(62, 1024).contiguous()
    index = torch.tensor([w.shape[0] - 1, 0, 7, 7])
    rows = torch.full((4, w.shape[1]), math.nan)
    dense(isa, w).rows(index.data_ptr(), 4, rows.data_ptr(), 1)
    assert torch.equal(rows, w[index].float())
    whole = torch.empty(w.shape)
    order = torch.arange(w.shape[0])
    dense(isa, w).rows(order.data_ptr(), w.shape[0], whole.data_ptr(), 2)
    assert torch.equal(whole, w.float())


@pytest.mark.parametrize("isa", available_isas())
def test_threads_do_not_change_a_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(5)
    w, x = torch.randn(403, 700, generator=g).bfloat16(), torch.randn(5, 700, generator=g)
    alone = linear(isa, w, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(linear(isa, w, x), alone)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_own_token_and_row_only(isa: str, bad: float) -> None:
    g = torch.Generator().manual_seed(6)
    w, x = torch.randn(19, 35, generator=g), torch.randn(3, 35, generator=g)
    broken = x.clone()
    broken[1, 34] = bad
    y = linear(isa, w, broken)
    assert not bool(y[1].isfinite().any()) and bool(y[[0, 2]].isfinite().all())
    w[4, 34] = bad
    y = linear(isa, w, x)
    assert not bool(y[:, 4].isfinite().any()) and int(y.isfinite().sum()) == 3 * 18


def test_refusals() -> None:
    w = torch.zeros(16, 16)
    for arguments, message in (
        ((9, w.data_ptr(), 0, 16, 16), "no instruction set 9"),
        ((0, w.data_ptr(), 3, 16, 16), "no dtype 3"),
        ((0, w.data_ptr(), 0, 0, 16), r"a dense weight \[0, 16\]"),
        ((0, w.data_ptr(), 0, 16, -1), r"a dense weight \[16, -1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_module().DenseWeight(*arguments)
    row = torch.tensor([16])
    with pytest.raises(ValueError, match="row 16 of a weight with 16"):
        dense("scalar", w).rows(row.data_ptr(), 1, w.data_ptr(), 1)
