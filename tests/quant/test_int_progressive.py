"""Progressive scales: levels that fit in int8 whatever the codes, fits near those of free scales, and the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitpalette.quant.bitstream import unpack_bits
from bitpalette.quant.codec import get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.int_progressive import check_group_scales, largest_group_scale
from bitpalette.quant.scheme import SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.tensor import QuantizedTensor, field_specs


def scheme_of(group_size: int = 64, symmetric: bool = False) -> IntScheme:
    return IntScheme(group_size=group_size, symmetric=symmetric, progressive=True)


def test_largest_group_scale_by_trying_all() -> None:
    for zero in range(16):
        fits = [s for s in range(1, 100) if all(-119 <= (code - zero) * s <= 119 for code in range(16))]
        assert int(largest_group_scale(torch.tensor(zero))) == max(fits)
        for s in fits:  # hence no byte of q * s + (128 - zero * s) carries
            assert all(0 <= code * s + 128 - zero * s <= 255 for code in range(16)) and 128 - zero * s >= 0


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        (15, 8, "group_scale 15 of row 1, group 2 does not fit the zero point 8: it is 1 to 14"),
        (8, 0, "zero point 0: it is 1 to 7"),
        (8, 15, "1 to 7"),
        (0, 8, "group_scale 0"),
        (255, 7, "group_scale 255"),
    ],
)
def test_what_would_overflow_is_refused(scale: int, zero: int, message: str) -> None:
    scales, zeros = torch.full((3, 4), 7, dtype=torch.uint8), torch.full((3, 4), 8, dtype=torch.uint8)
    check_group_scales(scales, zeros)
    scales[1, 2], zeros[1, 2] = scale, zero
    with pytest.raises(SchemeError, match=message) as error:
        check_group_scales(scales, zeros)
    assert "\n" not in str(error.value)


def weights_of_many_shapes(rng_weight: Any) -> list[torch.Tensor]:
    w = rng_weight(16, 256)
    one_sided, outlier, tiny = w.abs(), w.clone(), w * 1e-6
    outlier[:, 77] = 50.0
    groups_apart = w * torch.exp(3 * rng_weight(16, 4, seed=1)).repeat_interleave(64, 1)
    some_zero = w.clone()
    some_zero[3], some_zero[:, 64:128] = 0, 0
    return [w, one_sided, -one_sided, outlier, tiny, groups_apart, some_zero]


@pytest.mark.parametrize("symmetric", [True, False])
def test_fits_obey_the_limit_and_decode(symmetric: bool, rng_weight) -> None:
    scheme = scheme_of(symmetric=symmetric)
    for w in weights_of_many_shapes(rng_weight):
        qt = quantize_tensor(w, scheme)
        assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == field_specs(scheme, (16, 256))
        assert qt.fields["scale"].shape == (16, 1) and qt.fields["group_scale"].shape == (16, 4)
        zero = torch.full((16, 4), 8, dtype=torch.uint8)
        if not symmetric:
            zero = unpack_bits(qt.fields["zero_point"], 4, 4)
        check_group_scales(qt.fields["group_scale"], zero)
        codes = unpack_bits(qt.fields["codes"].view(16, -1), 256, 4).view(16, 4, 64).int()
        levels = (codes - zero[..., None].int()) * qt.fields["group_scale"][..., None].int()
        assert int(levels.abs().max()) <= 119
        expected = levels.float().view(16, 256) * qt.fields["scale"].float()
        assert torch.equal(qt.dequantize(), expected)
        assert (((expected - w).norm(dim=1) <= 0.5 * w.norm(dim=1)) | (w.abs().amax(1) < 1e-5)).all()


@pytest.mark.parametrize(
    ("symmetric", "spread", "most"), [(True, 0, 1.16), (False, 0, 1.05), (True, 0.7, 1.19), (False, 0.7, 1.08)]
)
def test_error_is_near_that_of_free_scales(symmetric: bool, spread: float, most: float, rng_weight) -> None:
    """spread: of the logarithm of the groups' size; small groups have small whole numbers."""
    w = rng_weight(64, 2048) * torch.exp(spread * rng_weight(64, 32, seed=1)).repeat_interleave(64, 1)
    error = [
        float((quantize_tensor(w, s).dequantize() - w).square().mean())
        for s in (IntScheme(group_size=64, symmetric=symmetric), scheme_of(64, symmetric))
    ]
    assert 1 < error[1] / error[0] < most


def test_the_largest_group_uses_the_range(rng_weight) -> None:
    """Whole numbers are precise where they are large: a fit that leaves half of the range empty is a bad one."""
    group_scale = quantize_tensor(rng_weight(64, 2048), scheme_of(128, True)).fields["group_scale"]
    assert (group_scale.amax(1) >= 10).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_last_group(symmetric: bool, rng_weight) -> None:
    w = rng_weight(9, 150)
    qt = quantize_tensor(w, scheme_of(64, symmetric))
    assert qt.fields["group_scale"].shape == (9, 3)
    assert output_error(w[:, 128:], qt.dequantize()[:, 128:], None) < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_fitted_again_keeps_the_row(symmetric: bool, rng_weight) -> None:
    scheme, w = scheme_of(32, symmetric), rng_weight(9, 80)
    grid = get_codec("int").grid(scheme, (9, 80), w.device)
    grid.fit(w)
    before = grid.pack(torch.zeros(9, 80, dtype=torch.uint8))
    grid.fit_group(0.5 * w[:, 32:64], 1)
    after = grid.pack(torch.zeros(9, 80, dtype=torch.uint8))
    assert torch.equal(before["scale"], after["scale"])
    halved = after["group_scale"][:, 1].float() / before["group_scale"][:, 1]
    assert (halved <= 0.75).all()
    assert torch.equal(before["group_scale"][:, [0, 2]], after["group_scale"][:, [0, 2]])
    codes, values = grid.nearest(w, torch.arange(80))
    assert torch.equal(QuantizedTensor(scheme, (9, 80), grid.pack(codes)).dequantize(), values)
    assert output_error(0.5 * w[:, 32:64], grid.nearest(0.5 * w, torch.arange(80))[1][:, 32:64], None) < 0.03


def test_importance_lowers_the_error_it_measures(rng_weight) -> None:
    w, energy = rng_weight(64, 256), torch.exp(2 * rng_weight(256, seed=1))
    stats = Stats(energy.diag(), energy.sqrt(), 1)
    plain, informed = quantize_tensor(w, scheme_of()), quantize_tensor(w, scheme_of(), stats=stats)
    assert output_error(w, informed.dequantize(), stats) < 0.95 * output_error(w, plain.dequantize(), stats)


def test_golden_bytes() -> None:
    """Two groups of 8, the second twice as wide as the first: 14 and 7 times the row's scale, exactly."""
    levels = torch.tensor([-8.0, -7, -5, -1, 0, 1, 5, 7])
    w = torch.cat([7 * levels, 14 * levels])[None] / 16
    qt = quantize_tensor(w, scheme_of(8, True))
    assert bytes(qt.fields["codes"].tolist()).hex() == "107398fd" * 2  # code = level + 8
    assert qt.fields["group_scale"].tolist() == [[7, 14]] and qt.fields["scale"].tolist() == [[1 / 16]]
    assert torch.equal(qt.dequantize(), w)
    w = torch.cat([3 * (levels + 8), 7 * (levels + 8)])[None] / 16  # 0 to 15: the zero point is 0, the most is 7
    qt = quantize_tensor(w, scheme_of(8, False))
    assert bytes(qt.fields["codes"].tolist()).hex() == "107398fd" * 2
    assert qt.fields["zero_point"].tolist() == [[0]]
    assert qt.fields["group_scale"].tolist() == [[3, 7]] and qt.fields["scale"].tolist() == [[1 / 16]]
    assert torch.equal(qt.dequantize(), w)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"progressive": True}, "group_size; got 4 and 0"),
        ({"progressive": True, "bits": 3, "group_size": 64}, "got 3"),
        ({"progressive": 1, "group_size": 64}, "got 1"),
        ({"progressive": True, "per_input_channel": True}, "progressive"),
    ],
)
def test_bad_schemes(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemeError, match=named):
        IntScheme(**values)
