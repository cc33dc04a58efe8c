"""Rotation and append of the KV cache by Triton: the bits of quant/kv_token.py."""

from __future__ import annotations

import math

import pytest
import torch

from bitpalette.kernels.kv_triton import KVTriton
from bitpalette.quant.kv_format import PAGE
from bitpalette.quant.kv_token import encode, pack, packed_bytes, rotate


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_append_is_encode_and_pack_bit_for_bit(bits: int, device: torch.device) -> None:
    torch.manual_seed(bits)
    for head_dim, dtype, unbiased in (
        (64, torch.float32, True),
        (80, torch.bfloat16, False),
        (128, torch.bfloat16, True),
        (72, torch.float32, False),
        (8, torch.float32, True),
        (256, torch.float16, False),
    ):
        x = torch.randn(11, 3, head_dim).to(dtype)
        x[2, 1] = 0
        x[3, 0, 1], x[4, 2, 7] = math.nan, math.inf
        x[5] *= 1e-3
        x[6] *= 1e4 if dtype == torch.float16 else 1e7  # a gain beyond float16, where x can be
        slots = torch.randperm(4 * PAGE)[:11]
        codes = torch.full((4, 3, PAGE, packed_bytes(head_dim, bits)), 0xA5, dtype=torch.uint8)
        gain = torch.full((4, 3, PAGE), 7.0, dtype=torch.float16)
        expected_codes, expected_gain = codes.clone(), gain.clone()
        c, s = encode(x, bits, unbiased)
        expected_codes[slots[:9] // PAGE, :, slots[:9] % PAGE] = pack(c, bits)[:9]
        expected_gain[slots[:9] // PAGE, :, slots[:9] % PAGE] = s[:9]
        slots[9], slots[10] = -1, 4 * PAGE  # nothing to do; no slot of these pages
        codes, gain = codes.to(device), gain.to(device)
        KVTriton().append(x.to(device), slots.to(device), codes, gain, bits, unbiased)
        assert torch.equal(codes.cpu(), expected_codes), head_dim
        same = (gain.cpu() == expected_gain) | (gain.cpu().isnan() & expected_gain.isnan())
        assert bool(same.all()), head_dim
        assert int(gain.isnan().sum()) == 2


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 120, 128, 256])
def test_rotation_is_that_of_the_format_bit_for_bit(head_dim: int, device: torch.device) -> None:
    torch.manual_seed(head_dim)
    x, mean = torch.randn(2, 4, 3, head_dim, device=device), torch.randn(3, head_dim, device=device)
    kernel = KVTriton()
    assert torch.equal(kernel.rotate(x), rotate(x))
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert torch.equal(kernel.rotate(half, mean=mean), rotate(half.float() - mean).to(dtype))
    turned = x.transpose(0, 1)  # strides of its own
    assert torch.equal(kernel.rotate(turned, torch.float32), rotate(turned))
    assert torch.equal(kernel.rotate(x[..., ::2]), rotate(x[..., ::2]))
    # all at once: centered, rotated and encoded
    one = torch.zeros(1, 3, PAGE, packed_bytes(head_dim, 4), dtype=torch.uint8), torch.zeros(1, 3, PAGE).half()
    one, two = (tuple(t.to(device) for t in one) for _ in range(2))
    slots = torch.arange(8, device=device)
    kernel.append(x.flatten(0, 1), slots, *one, 4, True, mean, rotated=False)
    kernel.append(rotate(x - mean).flatten(0, 1), slots, *two, 4, True)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert bool(one[0].any())


def test_refusals(device: torch.device) -> None:
    kernel, x = KVTriton(), torch.randn(2, 3, 64, device=device)
    codes = torch.zeros(1, 3, PAGE, 32, dtype=torch.uint8, device=device)
    gain = torch.zeros(1, 3, PAGE, device=device).half()
    with pytest.raises(ValueError, match=r"codes is torch.uint8 \[1, 3, 64, 32\].* of 2 bits"):
        kernel.append(x, torch.arange(2, device=device), codes, gain, 2, True)
    with pytest.raises(ValueError, match=r"slots is torch.int32"):
        kernel.append(x, torch.arange(2, dtype=torch.int32, device=device), codes, gain, 4, True)
    with pytest.raises(ValueError, match=r"a mean torch.float32 \[3, 32\]"):
        kernel.rotate(x, mean=torch.zeros(3, 32, device=device))
    with pytest.raises(ValueError, match="320 channels"):
        kernel.rotate(torch.randn(2, 320, device=device))
