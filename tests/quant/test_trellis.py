"""Codec `trellis`: the format by its definition, and the encoder through the public path."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpalette.quant.codec import get_codec
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, field_specs, stored_bytes
from bitpalette.quant.trellis import TrellisScheme, best_input_scale, levels, states


def by_definition(tile: bytes, m: int, window: int) -> list[int]:
    """The 256 levels of a tile, with Python's own integers."""
    string, length = int.from_bytes(tile, "little"), 16 * m
    twice = string | string << length  # cyclic
    out = []
    for i in range(256):
        state = (twice >> (i * m // 16)) & 0xFFFF & ((1 << window) - 1)
        product = (state * 0x83DCD12D) % 2**32
        out.append(sum(product.to_bytes(4, "little")) - 510)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 80), st.sampled_from([12, 14, 16]), st.integers(0, 2**32 - 1))
def test_levels_by_definition(m: int, window: int, seed: int) -> None:
    tiles = torch.randint(0, 256, (3, 2 * m), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    decoded = levels(window)[states(tiles, m, window).long()]
    assert decoded.tolist() == [by_definition(bytes(t.tolist()), m, window) for t in tiles]


def test_golden_tile() -> None:
    """2.5 bits: the bytes 0..79 of one tile, three weights by hand, and all of them by their hash."""
    tile = torch.arange(80, dtype=torch.uint8)
    qt = QuantizedTensor(
        TrellisScheme(2.5), (16, 16), {"codes": tile, "scale": torch.full((16,), 128.0, dtype=torch.float16)}
    )
    w = qt.dequantize()
    # bits 0..15 are bytes 0, 1: state 0x0100; 0x100 * 0x83DCD12D = 0x..DCD12D00, whose bytes add up to 0x1DA = 474
    assert w[0, 0] == 0xDC + 0xD1 + 0x2D + 0x00 - 510
    # row 1 begins at bit 40: bytes 5, 6: state 0x0605
    assert w[1, 0] == sum((0x0605 * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510
    # the last weight begins at bit 637 = 255 * 40 // 16: 3 bits of byte 79, then bytes 0 and 1 again
    last = (79 >> 5 | 0x0100 << 3) & 0xFFFF
    assert w[15, 15] == sum((last * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510
    digest = hashlib.sha256(w.to(torch.int16).numpy().tobytes()).hexdigest()
    assert digest == GOLDEN


GOLDEN = "20c7acc32f585854e3297ec2d4e3c1c9c41c4f7f3904eab1b471b2540c8d2030"


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (3, 17), (17, 123), (33, 577), (64, 64)], ids=str)
@pytest.mark.parametrize("rate", [1, 1.4375, 2.5, 4, 5])
def test_any_shape(shape: tuple[int, int], rate: float, rng_weight) -> None:
    scheme = TrellisScheme(rate, 12)
    specs = field_specs(scheme, shape)
    tiles = -(-shape[0] // 16) * -(-shape[1] // 16)
    assert specs["codes"] == ((tiles * int(32 * rate),), torch.uint8)  # padding is stored, and counted
    assert stored_bytes(scheme, shape) == tiles * int(32 * rate) + 2 * shape[0]
    w = rng_weight(*shape) * 0.02
    qt = quantize_tensor(w, scheme)
    q = qt.dequantize()
    assert q.shape == shape
    if min(shape) >= 16:
        mse = float((w - q).square().mean() / w.square().mean())
        assert mse < 1.7 * 4.0**-rate


def test_rows_of_zeros_and_of_any_size(rng_weight) -> None:
    w = rng_weight(48, 64)
    w[3] = 0
    w[17] *= 1e4
    w[40] *= 1e-4
    q = quantize_tensor(w, {"codec": "trellis", "rate": 4, "window": 12}).dequantize()
    assert (q[3] == 0).all()
    error = (w - q).square().sum(1) / w.square().sum(1).clamp(min=1e-30)
    assert (error < 0.02).all()


def test_a_scale_beyond_fp16(rng_weight) -> None:
    with pytest.raises(SchemeError, match="beyond fp16's 65504: keep them"):
        quantize_tensor(rng_weight(16, 16) * 1e6, {"codec": "trellis"})


@pytest.mark.parametrize(
    "values",
    [{"rate": 0.9}, {"rate": 5.0625}, {"rate": 2.51}, {"rate": "2"}, {"rate": True}, {"window": 13}, {"window": True}],
    ids=str,
)
def test_schemes_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match=next(iter(values))):
        Scheme.from_dict({"codec": "trellis", **values})


def test_scheme_in_json() -> None:
    scheme = Scheme.from_dict({"codec": "trellis", "rate": 3, "transforms": ["rotate", "order"]})
    assert scheme.to_dict() == {"codec": "trellis", "rate": 3.0, "transforms": ["rotate", "order"]}
    assert scheme.block == 16 and get_codec("trellis").rows_together == 16
    assert str(scheme) == "trellis rate=3.0 +rotate +order"


def test_the_input_scale_is_near_its_best(rng_weight) -> None:
    """A few per cent to either side is worse: the table is where the minimum is."""
    w = rng_weight(256, 64)
    for rate in (2.0, 3.0):
        scheme = TrellisScheme(rate, 12)
        grid = get_codec("trellis").grid(scheme, (256, 64), w.device)
        error = {}
        for factor in (0.9, 1.0, 1.1):
            grid.fit(w)
            grid.widen(torch.arange(256), factor)
            error[factor] = float((grid.nearest(w, torch.arange(64))[1] - w).square().mean())
        assert error[1.0] < error[0.9] and error[1.0] < error[1.1], error
    assert best_input_scale(TrellisScheme(1.5)) == pytest.approx(1.02, abs=0.005)
