"""The format "token": codes, gains, packed rows, golden bytes, and that the constants are what they claim to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitpalette.quant.hartley import hartley_hadamard
from bitpalette.quant.kv_token import STEP, decode, encode, levels, pack, packed_bytes, rotate, unpack

BITS = sorted(STEP)
WIDTHS = [64, 80, 96, 128, 256]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [8, *WIDTHS])
def test_pack_is_a_bijection(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits * width)
    codes = torch.randint(0, 1 << bits, (3, 5, width), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, packed_bytes(width, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)
    wild = torch.randint(0, 256, packed.shape, generator=generator).to(torch.uint8)
    assert torch.equal(pack(unpack(wild, bits), bits), wild)  # no bit is unused


def test_golden_rows() -> None:
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    assert bytes(pack(codes & 3, 2).tolist()).hex() == "e4e4"
    assert bytes(pack(codes, 3).tolist()).hex() == "e4e4f0"  # low planes of 0..3 twice, then four ones above four zeros
    assert bytes(pack(codes, 4).tolist()).hex() == "10325476"
    assert bytes(pack(codes, 8).tolist()).hex() == "0001020304050607"


GOLDEN = {  # {bits: (row, gain of a key and of a value)}, from the formulas in plain Python
    2: ("7427de89", "3880 3833"),
    3: ("ed49b82654ab", "35a4 357b"),
    4: ("736c5a39c8b7a594", "3250 3240"),
    8: ("4b7dae6fa060925284b576a76899598b", "2487 2486"),
}


def ramp() -> Tensor:
    """Sixteen numbers without ties: no code is near a boundary."""
    return torch.tensor([(7 * i % 16 - 7.4) / 4 for i in range(16)])


def test_golden_vector() -> None:
    """One vector in every width of code: packed bytes and the bits of both gains."""
    found = {}
    for bits in BITS:
        codes, key = encode(ramp(), bits, unbiased=True)
        _, value = encode(ramp(), bits, unbiased=False)
        gains = [int(g.view(torch.int16)) & 0xFFFF for g in (key, value)]
        found[bits] = (bytes(pack(codes, bits).tolist()).hex(), f"{gains[0]:04x} {gains[1]:04x}")
    assert found == GOLDEN


@pytest.mark.parametrize("width", [1, 2, 3, 12, 17, *WIDTHS])
def test_rotation_is_the_hartley_hadamard_transform(width: int, rng_weight) -> None:
    x = rng_weight(7, width)
    assert (rotate(x) - hartley_hadamard(x)).abs().max() < 1e-5
    assert (rotate(rotate(x.double())) - x).abs().max() < 1e-12
    assert rotate(x.bfloat16()).dtype == torch.float32
    alone = torch.stack([rotate(row) for row in x])
    assert torch.equal(alone, rotate(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_by_one_is_all_at_once(bits: int, width: int, rng_weight) -> None:
    z = rng_weight(2, 33, width)
    codes, gain = encode(z, bits, unbiased=True)
    for i in range(33):
        one, its = encode(z[:, i], bits, unbiased=True)
        assert torch.equal(one, codes[:, i]) and torch.equal(its, gain[:, i])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 300.0])
def test_gain_of_keys_is_unbiased(bits: int, scale: float, rng_weight) -> None:
    z = rng_weight(500, 128) * scale
    stored = decode(*encode(z, bits, unbiased=True), bits)
    ratio = (z * stored).sum(-1) / (z * z).sum(-1)
    assert ((ratio - 1).abs() <= 2**-11 + 1e-6).all()  # what fp16 leaves of the gain
    shrunk = decode(*encode(z, bits, unbiased=False), bits)
    ratio = (z * shrunk).sum(-1) / (z * z).sum(-1)
    assert ((ratio - 1).mean() <= (-0.1 if bits == 2 else 0)).all()


@pytest.mark.parametrize("bits", BITS)
def test_gain_of_values_is_the_best(bits: int, rng_weight) -> None:
    z = rng_weight(200, 64)
    codes, gain = encode(z, bits, unbiased=False)

    def error(factor: float) -> Tensor:
        return (levels(codes, bits) * gain.float()[:, None] * factor - z).square().sum(-1)

    best = error(1.0)
    assert (best <= error(1.004)).all() and (best <= error(0.996)).all()


def midpoint_error(step: float, bits: int, fitted: bool) -> float:
    """Squared error of N(0, 1) on the grid of 2^bits midpoints, exactly; fitted: with the best gain afterwards."""
    half = 1 << (bits - 1)
    along = square = 0.0
    for i in range(half):
        low, high = i * step, (i + 1) * step if i < half - 1 else math.inf
        q = (i + 0.5) * step
        along += 2 * q * (density(low) - density(high))
        square += q * q * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    return 1 - along**2 / square if fitted else 1 - 2 * along + square


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_steps_are_the_minimum(bits: int, fitted: bool) -> None:
    error = midpoint_error(STEP[bits], bits, fitted)
    for delta in (1e-4, 1e-3, 1e-2, 0.1, 0.5):
        assert error < midpoint_error(STEP[bits] * (1 + delta), bits, fitted)
        assert error < midpoint_error(STEP[bits] * (1 - delta), bits, fitted)


@pytest.mark.parametrize(("width", "tolerance"), [(64, 0.15), (4096, 0.02)])
@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1188), (3, 0.03744), (4, 0.01154), (8, 8.77e-5)])
def test_measured_error(bits: int, expected: float, width: int, tolerance: float, rng_weight) -> None:
    """Short vectors do a little better than the table: scaled by their own rms, they have no long tails."""
    z = rng_weight((1 << 18) // width, width)
    stored = decode(*encode(z, bits, unbiased=False), bits)
    measured = float((stored - z).square().sum() / z.square().sum())
    assert abs(measured / expected - 1) <= tolerance


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_zeros_nan_infinity_and_extremes(bits: int, unbiased: bool) -> None:
    z = torch.ones(6, 64)
    z[0] = 0
    z[1, 3] = float("nan")
    z[2, 5] = -float("inf")
    z[3] = torch.eye(64)[7] * 30000  # all in one place
    z[4] = 3e38  # longer than fp16 can hold
    z[5] = 1e-30
    codes, gain = encode(z, bits, unbiased)
    stored = decode(codes, gain, bits)
    assert torch.equal(stored[0], torch.zeros(64)) and (codes[:3] == 1 << (bits - 1)).all()
    assert stored[1:3].isnan().all()
    assert stored[3:].isfinite().all() and (gain[3:] >= 0).all()
    assert int(stored[3].argmax()) == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input(dtype: torch.dtype, rng_weight) -> None:
    z = rng_weight(9, 64).to(dtype)
    codes, gain = encode(z, 4, unbiased=True)
    again, its = encode(z.float(), 4, unbiased=True)
    assert torch.equal(codes, again) and torch.equal(gain, its)
