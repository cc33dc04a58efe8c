"""Block floating point: golden blocks, errors, what is no number, and the order of key channels."""

from __future__ import annotations

import pytest
import torch

from bitpalette.quant.kv_bfp import channel_order, decode, encode


def test_golden_block() -> None:
    """Largest 3.0: e = 1, one step is 2^(1 + 2 - 4) = 1/2 at 4 bits; 3.0 is mantissa 6, code 14."""
    x = torch.zeros(32)
    x[:6] = torch.tensor([3.0, -3.0, 0.25, 0.75, -0.26, 0.3])
    codes, exponents = encode(x, 4, 32)
    assert codes[:7].tolist() == [14, 2, 8, 10, 7, 9, 8] and exponents.tolist() == [128]  # .25 and .75: ties to even
    assert decode(codes, exponents, 4)[:7].tolist() == [3, -3, 0, 1, -0.5, 0.5, 0]
    codes, exponents = encode(torch.full((32,), -1.99), 2, 32)
    assert codes.tolist() == [0] * 32 and exponents.tolist() == [127]
    assert (decode(codes, exponents, 2) == -2).all()
    codes, exponents = encode(torch.full((32,), 1.99), 2, 32)
    assert (decode(codes, exponents, 2) == 1).all()  # two's complement ends at 2^(b-1) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_error_is_half_a_step_of_the_largest(bits: int, block: int, scale: float, rng_weight) -> None:
    x = rng_weight(5, 3, 128) * scale
    codes, exponents = encode(x, bits, block)
    assert codes.shape == x.shape and exponents.shape == (5, 3, 128 // block)
    largest = x.unflatten(-1, (-1, block)).abs().amax(-1, keepdim=True)
    step = torch.exp2(torch.floor(torch.log2(largest.double())) + 2 - bits)
    error = (decode(codes, exponents, bits) - x).unflatten(-1, (-1, block)).double()
    assert (error.abs() <= step).all()  # a positive largest number is cut by up to a step
    inside = x.unflatten(-1, (-1, block)) <= (1 << (bits - 1)) * step - 1.5 * step
    assert (error.abs()[inside] <= (step.expand_as(error) / 2)[inside] * 1.0001).all()


def test_zeros_and_what_is_no_number() -> None:
    x = torch.zeros(3, 64)
    x[1, 40], x[2, 0], x[2, 40] = float("nan"), float("inf"), 1e-39  # the last below the smallest exponent
    codes, exponents = encode(x, 3, 32)
    assert exponents.tolist() == [[0, 0], [0, 255], [255, 0]]
    decoded = decode(codes, exponents, 3)
    assert (decoded[:, 32:][[0, 2]] == 0).all() and (decoded[:2, :32] == 0).all()
    assert decoded[1, 32:].isnan().all() and decoded[2, :32].isnan().all()


def test_order_goes_by_the_norm_of_both_of_a_pair() -> None:
    weight = torch.zeros(2 * 8, 4)
    weight[1, 0], weight[5, 0], weight[3, 0] = 1.0, 2.0, 2.1  # head 0: pairs (1, 5): 5.0, (3, 7): 4.4
    weight[8 + 6] = 1.0  # head 1: pair (2, 6)
    order = channel_order(weight, 2, 8)
    assert order.tolist() == [[1, 5, 3, 7, 0, 2, 4, 6], [2, 6, 0, 1, 3, 4, 5, 7]]
    assert channel_order(weight, 2, 0)[0].tolist() == [3, 5, 1, 0, 2, 4, 6, 7]
    assert channel_order(weight, 2, 4)[0].tolist()[:4] == [5, 1, 3, 0]  # 5 is not turned
    bias = torch.zeros(16)
    bias[0] = 10.0
    assert channel_order(weight, 2, 8, bias)[0].tolist()[:2] == [0, 4]


def test_sorting_gathers_large_channels_in_one_block(rng_weight) -> None:
    """Eight large pairs of 64: unsorted they spoil both blocks, sorted only one."""
    weight = rng_weight(128, 16)
    large = torch.arange(8) * 7
    weight[large] *= 30
    weight[large + 64] *= 30
    keys = (rng_weight(200, 16) @ weight.T).view(200, 128)
    order = channel_order(weight, 1, 128)[0]
    assert set(order[:16].tolist()) == {*large.tolist(), *(large + 64).tolist()}
    small = torch.ones(128, dtype=torch.bool)
    small[order[:32]] = False
    errors = []
    for at in (torch.arange(128), order):
        back = torch.empty_like(keys)
        back[:, at] = decode(*encode(keys[:, at], 4, 32), 4)
        errors.append(float((back - keys)[:, small].square().mean()))
    assert errors[1] <= errors[0] / 20
