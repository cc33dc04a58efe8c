"""The format "channel": golden codes, errors, groups that do not mix, and what is no number."""

from __future__ import annotations

import pytest
import torch

from bitpalette.quant.kv_channel import decode_keys, decode_values, encode_keys, encode_values
from bitpalette.quant.kv_token import pack


def test_golden_group() -> None:
    """0, 1 .. 31 in 2 bits: scale 31 / 3 = 0x492b in fp16 (10.336), codes change at 5.2, 15.5 and 25.8."""
    x = torch.arange(32.0)
    codes, groups = encode_values(x, 2)
    assert codes.tolist() == [0] * 6 + [1] * 10 + [2] * 10 + [3] * 6
    assert [int(g) & 0xFFFF for g in groups.view(torch.int16).flatten()] == [0x492B, 0]
    assert bytes(pack(codes, 2).tolist()).hex() == "00505555aaaafaff"
    codes, groups = encode_values(x / 8 - 1, 3)
    assert codes.tolist() == [0] * 3 + [1] * 4 + [2] * 5 + [3] * 4 + [4] * 4 + [5] * 5 + [6] * 4 + [7] * 3
    assert groups.flatten().tolist() == [torch.tensor(31 / 8 / 7).half().item(), -1]
    assert (decode_values(codes, groups) - (x / 8 - 1)).abs().max() <= 31 / 8 / 7 / 2 + 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_error_is_half_a_step(bits: int, shift: float, rng_weight) -> None:
    x = rng_weight(3, 64, 96) + shift
    rounding = 2**-10 * x.abs().max()  # of minimum and scale to fp16
    for encode, decode, dim in ((encode_keys, decode_keys, -2), (encode_values, decode_values, -1)):
        codes, groups = encode(x, bits)
        assert codes.shape == x.shape and int(codes.max()) < 1 << bits and groups.dtype == torch.float16
        grouped = x.unflatten(dim, (-1, 32))
        at = dim if dim == -1 else -2
        step = ((grouped.amax(at, keepdim=True) - grouped.amin(at, keepdim=True)) / ((1 << bits) - 1)).expand_as(
            grouped
        )
        error = (decode(codes, groups) - x).unflatten(dim, (-1, 32)).abs()
        assert (error <= step / 2 + rounding).all()


def test_keys_are_grouped_along_tokens_and_values_along_channels(rng_weight) -> None:
    x = rng_weight(64, 64)
    changed = x.clone()
    changed[40, 7] = 50.0
    found = {}
    for name, encode, decode in (("k", encode_keys, decode_keys), ("v", encode_values, decode_values)):
        found[name] = (decode(*encode(x, 4)) != decode(*encode(changed, 4))).nonzero()
    assert set(found["k"][:, 1].tolist()) == {7} and found["k"][:, 0].min() >= 32
    assert set(found["v"][:, 0].tolist()) == {40} and found["v"][:, 1].max() < 32


def test_equal_numbers_zeros_and_what_is_no_number() -> None:
    x = torch.zeros(32, 64)
    x[:, :32] = 3.0
    for encode, decode in ((encode_keys, decode_keys), (encode_values, decode_values)):
        assert torch.equal(decode(*encode(x, 2)), x)  # no division by a range of zero
        for strange in (float("nan"), float("inf"), -float("inf")):
            wrong = x.clone()
            wrong[5, 6] = strange
            decoded = decode(*encode(wrong, 2))
            assert decoded[5, 6].isnan() and int(decoded.isnan().sum()) == 32
    large = torch.full((32, 32), 1e6)
    assert (decode_values(*encode_values(large, 4)) == 65504).all()


def test_bf16_is_encoded_as_float32(rng_weight) -> None:
    x = rng_weight(32, 32).bfloat16()
    assert torch.equal(encode_keys(x, 3)[0], encode_keys(x.float(), 3)[0])
