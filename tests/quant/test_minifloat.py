"""Small floats: values by the OCP specification's own numbers, rounding against torch and against all values."""

from __future__ import annotations

import math

import pytest
import torch

from bitpalette.quant.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    ELEMENTS,
    Minifloat,
    e8m0_codes,
    e8m0_values,
    round_to_power_of_two,
)

FORMATS = list(ELEMENTS.values())


def test_values_of_the_specification() -> None:
    """OCP MX 1.0, tables 2 to 5: largest, least normal, least subnormal."""
    assert E2M1.values.tolist()[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for element, normal, subnormal in ((E3M2, 0.25, 0.0625), (E2M3, 1.0, 0.125), (E4M3, 2.0**-6, 2.0**-9)):
        assert float(element.values[1]) == subnormal and float(element.values[1 << element.mantissa]) == normal
    assert [float(f.values[: 1 << (f.bits - 1)].nan_to_num(0).max()) for f in FORMATS] == [6.0, 28.0, 7.5, 448.0]
    for element in FORMATS:
        half = 1 << (element.bits - 1)
        assert torch.equal(element.values[half:].nan_to_num(9e9), -element.values[:half].nan_to_num(-9e9))
        assert math.copysign(1, float(element.values[half])) == -1


def test_e4m3_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3.values.isnan(), theirs.isnan()) and int(theirs.isnan().sum()) == 2
    assert torch.equal(E4M3.values.nan_to_num(0), theirs.nan_to_num(0))
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1 << 17, generator=generator) * torch.exp(4 * torch.randn(1 << 17, generator=generator))
    u = u.clamp(-448, 448)  # torch makes NaN of what is beyond
    assert torch.equal(E4M3.round(u), u.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("element", FORMATS, ids=lambda f: f.name)
def test_nearest_of_all_values(element: Minifloat) -> None:
    values = element.values[~element.values.isnan()].unique()
    middle = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(1)
    u = torch.cat(
        [torch.randn(4000, generator=generator) * element.largest / 3, values, middle, middle.nextafter(u_max)]
    )
    rounded, codes = element.round(u), element.encode(u)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << element.bits
    assert torch.equal(element.values[codes.int()], rounded)
    best = (u[:, None].double() - values.double()).abs().amin(1)
    assert torch.equal((u.double() - rounded.double()).abs(), best)
    assert (element.encode(middle) % 2 == 0).all()  # midway: the even code
    assert not (codes == 1 << (element.bits - 1)).any()  # no negative zero


u_max = torch.tensor(torch.finfo(torch.float32).max)


@pytest.mark.parametrize("element", FORMATS, ids=lambda f: f.name)
def test_beyond_the_largest_is_the_largest(element: Minifloat) -> None:
    u = torch.tensor([element.largest * 1.01, 1e30, math.inf, -math.inf])
    assert element.round(u).tolist() == [element.largest] * 3 + [-element.largest]
    assert element.values[element.encode(u).int()].tolist() == [element.largest] * 3 + [-element.largest]


def test_powers_of_two() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = e8m0_values(codes)
    assert values[:255].tolist() == [2.0**k for k in range(-127, 128)] and math.isnan(float(values[255]))
    assert torch.equal(e8m0_codes(values[1:255]), codes[1:255])
    scale = torch.tensor([0.0, 1e-45, 1.0, 1.49, 1.5, 2.9, 3.0, 3e38])
    assert round_to_power_of_two(scale).tolist() == [2.0**-126, 2.0**-126, 1.0, 1.0, 2.0, 2.0, 4.0, 2.0**127]
