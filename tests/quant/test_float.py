"""Codec `float`: golden bytes, block scales, the published formats' own rule as the least to beat, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import get_codec
from bitpalette.quant.float import FloatScheme, group_scales
from bitpalette.quant.minifloat import ELEMENTS
from bitpalette.quant.scheme import SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.tensor import QuantizedTensor, field_specs

MXFP4 = FloatScheme(scale_format="e8m0", group_size=32)
NVFP4 = FloatScheme(scale_format="e4m3", group_size=16)
SCHEMES = [
    *(FloatScheme(element=e, group_size=g) for e in ELEMENTS for g in (0, 64)),
    *(FloatScheme(element=e, group_size=32, scale_format="e8m0") for e in ELEMENTS),
    NVFP4,
]


def mean_error(w: Tensor, qt: QuantizedTensor) -> float:
    return float((qt.dequantize() - w).square().mean())


# rtn, seed 0, [256, 576]
ERRORS = {
    ("fp16", 0): {"e2m1": 0.01185, "e3m2": 0.002572, "e2m3": 0.000709, "e4m3": 0.000650},
    ("fp16", 64): {"e2m1": 0.00959, "e3m2": 0.00215, "e2m3": 0.000567, "e4m3": 0.000539},
    ("e8m0", 32): {"e2m1": 0.01245, "e3m2": 0.00279, "e2m3": 0.000798, "e4m3": 0.000707},
    ("e4m3", 16): {"e2m1": 0.00766},
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_on_normal_weights(scheme: FloatScheme, rng_weight) -> None:
    w = rng_weight(256, 576)
    expected = ERRORS[scheme.scale_format, scheme.group_size][scheme.element]
    assert 0.9 * expected < mean_error(w, quantize_tensor(w, scheme)) < 1.02 * expected


def by_the_specification(w: Tensor, element: str) -> Tensor:
    """OCP MX 1.0, section 6.3: the scale is 2^(floor(log2(largest |w|)) - exponent of the element's largest)."""
    largest = ELEMENTS[element].largest
    blocks = w.reshape(len(w), -1, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True)))
    scale = torch.exp2(exponent - torch.floor(torch.log2(torch.tensor(largest))))
    values = ELEMENTS[element].values.nan_to_num(0).unique()
    nearest = (blocks[..., None] / scale[..., None] - values).abs().argmin(-1)
    return (values[nearest] * scale).reshape(w.shape)


@pytest.mark.parametrize("element", ELEMENTS)
def test_no_worse_than_the_specifications_scale_in_any_block(element: str, rng_weight) -> None:
    w = rng_weight(32, 256)
    ours = quantize_tensor(w, FloatScheme(element=element, scale_format="e8m0", group_size=32)).dequantize()
    theirs = by_the_specification(w, element)

    def error(q: Tensor) -> Tensor:
        return (q - w).square().view(32, -1, 32).sum(-1)

    assert (error(ours) <= error(theirs) * (1 + 1e-5)).all()


def test_no_worse_than_the_covering_scale_of_nvfp4(rng_weight) -> None:
    """NVFP4's usual rule: the tensor's scale is max|w| / (6 * 448), a block's is max|w| / 6 in e4m3 of that."""
    w = rng_weight(32, 256)
    qt = quantize_tensor(w, NVFP4)
    tensor_scale = w.abs().max() / (6 * 448)
    assert torch.equal(qt.fields["tensor_scale"], tensor_scale.reshape(1))
    blocks = w.view(32, -1, 16)
    block = (blocks.abs().amax(-1, keepdim=True) / 6 / tensor_scale).to(torch.float8_e4m3fn).float() * tensor_scale
    values = ELEMENTS["e2m1"].values.unique()
    theirs = values[(blocks[..., None] / block[..., None] - values).abs().argmin(-1)] * block
    ours = (qt.dequantize().view_as(blocks) - blocks).square().sum(-1)
    assert (ours <= (theirs - blocks).square().sum(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_of_the_grid_are_what_decodes(scheme: FloatScheme, rng_weight) -> None:
    w = rng_weight(7, 150)
    grid = get_codec("float").grid(scheme, (7, 150), w.device)
    grid.fit(w)
    codes, values = grid.nearest(w, torch.arange(150))
    columns = [grid.nearest(w[:, i : i + 1], torch.tensor([i])) for i in range(150)]
    assert torch.equal(torch.cat([c for c, _ in columns], 1), codes)
    assert torch.equal(torch.cat([v for _, v in columns], 1), values)
    qt = QuantizedTensor(scheme, (7, 150), grid.pack(codes))
    assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == field_specs(scheme, (7, 150))
    assert torch.equal(qt.dequantize(), values)


def test_golden_bytes() -> None:
    w = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.25]])
    qt = quantize_tensor(w / 8, FloatScheme())
    assert bytes(qt.fields["codes"].tolist()).hex() == "10325476a9cbed0f"  # .25 is midway: the even code, 0
    assert qt.fields["scale"].tolist() == [[0.125]]
    qt = quantize_tensor(torch.cat([w, w * 4], 1) / 8, NVFP4)
    assert bytes(qt.fields["codes"].tolist()).hex() == "10325476a9cbed0f" * 2
    assert qt.fields["scale"].tolist() == [[0x6E, 0x7E]]  # 112 and 448
    assert torch.equal(qt.fields["tensor_scale"], torch.tensor([3 / (6 * 448)]))
    qt = quantize_tensor(torch.cat([w, -w], 1) * 2.0**-9, MXFP4)
    assert bytes(qt.fields["codes"].tolist()).hex() == "10325476a9cbed0f90badcfe21436507"
    assert qt.fields["scale"].tolist() == [[127 - 9]]
    for element, codes in (("e2m3", "083c1f"), ("e3m2", "d04b7f"), ("e4m3", None)):
        format = ELEMENTS[element]
        levels = torch.tensor([[0.0 if element == "e2m3" else 1.0, -1.0, 1.0, format.largest]])
        qt = quantize_tensor(levels, FloatScheme(element=element))
        assert qt.fields["scale"].tolist() == [[1.0]] and torch.equal(qt.dequantize(), levels)
        if codes is None:
            assert bytes(qt.fields["codes"].tolist()).hex() == "38b8387e"
        else:
            one = {"e2m3": 8, "e3m2": 12}[element]
            by_hand = [0 if element == "e2m3" else one, 32 + one, one, 31]
            assert torch.equal(qt.fields["codes"], pack_bits(torch.tensor([by_hand], dtype=torch.uint8), 6).flatten())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_zeros_and_one_outlier(scheme: FloatScheme) -> None:
    w = torch.zeros(3, 128)
    assert torch.equal(quantize_tensor(w, scheme).dequantize(), w)
    w[1, 5], w[2, 7:20] = 3.0, -0.75
    q = quantize_tensor(w, scheme).dequantize()
    assert torch.equal(q[0], w[0])
    assert ((q - w).abs() <= 0.04 * w.abs()).all()


def test_every_stored_scale_decodes_exactly() -> None:
    """By plain powers: e8m0 and e4m3 under a tensor's scale, code 1.0 in the first column."""
    codes = pack_bits(torch.full((255, 32), 2, dtype=torch.uint8), 4).flatten()
    qt = QuantizedTensor(MXFP4, (255, 32), {"codes": codes, "scale": torch.arange(255).to(torch.uint8)[:, None]})
    assert qt.dequantize()[:, 0].tolist() == [2.0 ** (k - 127) for k in range(255)]
    fields = {
        "codes": codes[: 127 * 16],
        "scale": torch.arange(254).to(torch.uint8).view(127, 2) % 127,
        "tensor_scale": torch.tensor([0.25]),
    }
    qt = QuantizedTensor(NVFP4, (127, 32), fields)
    expected = fields["scale"].view(torch.float8_e4m3fn).float() * 0.25
    assert torch.equal(qt.dequantize()[:, ::16], expected) and torch.equal(group_scales(NVFP4, fields), expected)


def test_nan_codes_stay_visible() -> None:
    qt = quantize_tensor(torch.ones(1, 8), FloatScheme(element="e4m3"))
    qt.fields["codes"][3] = 0x7F
    assert qt.dequantize().isnan().tolist() == [[False] * 3 + [True] + [False] * 4]


def test_range_of_scales(rng_weight) -> None:
    w = rng_weight(4, 64)
    with pytest.raises(SchemeError, match=r"fp16"):
        quantize_tensor(w / w.abs().max() * 5e5, FloatScheme())
    for size in (1e-30, 1e30):  # blocks have the range of float32
        for scheme in (MXFP4, NVFP4):
            big = w.double() * size
            q = quantize_tensor(big.float(), scheme).dequantize().double()
            assert float((q - big).norm() / big.norm()) < 0.13, (scheme, size)


def test_importance_lowers_the_error_it_measures(rng_weight) -> None:
    w, energy = rng_weight(64, 256), torch.exp(2 * rng_weight(256, seed=1))
    stats = Stats(energy.diag(), energy.sqrt(), 1)
    for scheme in (FloatScheme(group_size=64), NVFP4, MXFP4):
        plain, informed = quantize_tensor(w, scheme), quantize_tensor(w, scheme, stats=stats)
        assert output_error(w, informed.dequantize(), stats) < 0.97 * output_error(w, plain.dequantize(), stats)
