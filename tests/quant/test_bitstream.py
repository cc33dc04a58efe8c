"""The canonical bit stream: golden bytes of every width, and pack against unpack for any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpalette.quant.bitstream import pack_bits, row_bytes, unpack_bits

# ten codes 1, 2, 3, .. modulo 2^bits, least significant bit first
GOLDEN = {
    1: "5501",
    2: "393909",
    3: "d1581f11",
    4: "21436587a9",
    5: "410c52cc414901",
    6: "8130108571208902",
    7: "01c18050301c100905",
    8: "0102030405060708090a",
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_bytes(bits: int) -> None:
    codes = torch.arange(1, 11, dtype=torch.uint8)[None] & ((1 << bits) - 1)
    stream = sum(int(c) << (i * bits) for i, c in enumerate(codes[0]))  # the definition, in Python integers
    packed = bytes(pack_bits(codes, bits)[0].tolist())
    assert packed == stream.to_bytes(row_bytes(10, bits), "little")
    assert packed.hex() == GOLDEN[bits]


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack(bits: int, rows: int, n: int, random) -> None:
    codes = torch.tensor([[random.randrange(1 << bits) for _ in range(n)] for _ in range(rows)], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, row_bytes(n, bits)) and packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert torch.equal(unpack_bits(packed, n, bits), codes)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert sum(c << (i * bits) for i, c in enumerate(row)) == int.from_bytes(bytes(stream), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_input_and_no_alias(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).T
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, pack_bits(codes.contiguous(), bits))
    before = packed.clone()
    unpack_bits(packed, 16, bits).zero_()
    assert torch.equal(packed, before)
