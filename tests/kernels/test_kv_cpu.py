"""kernels/kv_cpu.py against float64 on the same decoded values, on every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels.kv_cpu import KVCpu
from bitpalette.kernels.kv_parts import BITS, Dense, Pages
from bitpalette.kernels.kv_reference import attention
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.quant.kv_format import PAGE, KVFormat
from bitpalette.quant.kv_token import decode, encode, pack, packed_bytes, rotate
from bitpalette.quant.native import available_isas

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

ISAS = available_isas()
# head_dim, queries of a kv head, tokens in pages, new tokens
SHAPES = (
    (64, 1, 64, 1),
    (80, 3, 63, 4),
    (96, 2, 200, 1),
    (128, 4, 65, 4),
    (256, 8, 200, 1),
    (72, 5, 1, 16),
    (8, 7, 129, 3),
)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(k: Tensor, v: Tensor, bits_k: int, bits_v: int, g: torch.Generator) -> tuple[Pages, Tensor, Tensor]:
    """Pages of one row with k, v [tokens, heads, D] in a shuffled order, rubbish and NaN elsewhere; decoded k, v."""
    tokens, heads, width = k.shape
    used = -(-tokens // PAGE)
    table = torch.randperm(used + 2, generator=g)[:used]
    t = torch.arange(tokens)
    at, sides = (table[t // PAGE], t % PAGE), []
    for x, bits, unbiased in ((k, bits_k, True), (v, bits_v, False)):
        codes, gain = encode(x, bits, unbiased)
        rows = torch.randint(0, 256, (used + 2, heads, PAGE, packed_bytes(width, bits)), generator=g).to(torch.uint8)
        gains = torch.full((used + 2, heads, PAGE), math.nan, dtype=torch.float16)
        rows[at[0], :, at[1]], gains[at[0], :, at[1]] = pack(codes, bits), gain
        sides.append((rows, gains, decode(codes, gain, bits).double()))
    (kc, kg, k64), (vc, vg, v64) = sides
    pages = Pages(kc, kg, vc, vg, bits_k, bits_v, table.int()[None], int32(tokens))
    return pages, k64, v64


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """float64 [1, heads, n, D]; k, v [tokens, kv_heads, D]."""
    n, tokens = q.shape[2], k.shape[0]
    grouped = q[0].double().unflatten(0, (k.shape[1], -1))
    score = grouped @ k.transpose(0, 1)[:, None].mT * scale
    position = tokens - n + torch.arange(n)
    score = score.masked_fill(torch.arange(tokens) > position[:, None], -math.inf)
    return (score.softmax(-1) @ v.transpose(0, 1)[:, None]).flatten(0, 1)[None]


def rounded(q: Tensor) -> Tensor:
    """Queries as they are without `exact`: 8 bits and a scale of their own."""
    unit = q.abs().amax(-1, keepdim=True) / 127
    return (q * (1 / unit)).round() * unit


def error(out: Tensor, ref: Tensor) -> Tensor:
    return (out.double() - ref).norm(dim=-1) / ref.norm(dim=-1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2), (3, 8)])
def test_attention_is_that_of_the_decoded_cache(isa: str, bits: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(sum(bits))
    for head_dim, group, tokens, n in SHAPES:
        k, v = torch.randn(2, tokens, 2, head_dim, generator=g)
        pages, k64, v64 = packed(k, v, *bits, g)
        new = Dense(*(torch.randn(1, n, 2, head_dim, generator=g).bfloat16() for _ in range(2)), int32(n))
        q = torch.randn(1, 2 * group, n, head_dim, generator=g)
        keys, values = (torch.cat((x, y[0].double())) for x, y in ((k64, new.keys), (v64, new.values)))
        for exact in (False, True):
            out = KVCpu(isa).attend(q, pages, fresh=new, scale=head_dim**-0.5, exact=exact)
            ref = dense_attention(q, keys, values, head_dim**-0.5)
            if exact:
                assert (error(out, ref) <= 1e-3).all(), (head_dim, group, tokens, n)
                continue
            # pages see the rounded queries, new tokens the queries themselves: between both references
            assert (error(out, ref) <= 4e-2).all(), (head_dim, group, tokens, n)
            if n == 1 and tokens > 1:  # without new tokens, the rounding is all
                alone = KVCpu(isa).attend(q, pages, scale=head_dim**-0.5, exact=False)
                assert (error(alone, dense_attention(rounded(q), k64, v64, head_dim**-0.5)) <= 1e-3).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("text", ["k4v4", "k2v3", "k8v8"])
@pytest.mark.parametrize("n", [1, 5])
def test_whole_caches_are_as_the_reference_has_them(isa: str, text: str, n: int) -> None:
    """Rows of different lengths, left padding, sinks, a ring that goes round, softcap, sliding windows, sink logits."""
    g = torch.Generator().manual_seed(3)
    rows = KVRows(KVFormat.parse(text, sinks=4, window=10), 3, 2, 64, 64, torch.float16, torch.device("cpu"))
    length, skip = 150, np.array([0, 60, 148])
    rows.append(*rows.stored(*torch.randn(2, 3, 2, length, 64, generator=g)), skip)
    for _ in range(7):
        rows.append(*rows.stored(*torch.randn(2, 3, 2, 1, 64, generator=g)), np.zeros(3, np.int64))
    q, none = torch.randn(3, 8, n, 64, generator=g), np.zeros(3, np.int64)
    new = rows.stored(*torch.randn(2, 3, 2, n, 64, generator=g))
    logits = torch.randn(8, generator=g)
    for options in ({}, {"softcap": 3.0}, {"sliding_window": 40}, {"sliding_window": 7}, {"sink_logits": logits}):
        for fresh in (new, None):
            ref = attention(q, rows, fresh, none, 0.125, dtype=torch.float64, **options)
            out = KVCpu(isa).attention(q, rows, fresh, none, 0.125, exact=True, **options)
            assert (error(out, ref) <= 2e-3).all(), (options, fresh is None)


@pytest.mark.parametrize("isa", ISAS)
def test_padding_sees_nothing_and_is_zero(isa: str) -> None:
    g = torch.Generator().manual_seed(4)
    rows = KVRows(KVFormat.parse("k4v4", sinks=2, window=3), 2, 1, 64, 64, torch.bfloat16, torch.device("cpu"))
    q, skip = torch.randn(2, 2, 6, 64, generator=g), np.array([0, 4])
    new = rows.stored(*torch.randn(2, 2, 1, 6, 64, generator=g))
    out = KVCpu(isa).attention(q, rows, new, skip, 0.125)
    ref = attention(q, rows, new, skip, 0.125, dtype=torch.float64)
    assert bool((out[1, :, :4] == 0).all())
    seen = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])[:, None].expand(2, 2, 6)
    assert (error(out[seen], ref[seen]) <= 1e-3).all()


@pytest.mark.parametrize("isa", ISAS)
def test_positions_before_start_are_not_seen(isa: str) -> None:
    g = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 300, 2, 64, generator=g)
    pages, k64, v64 = packed(k, v, 4, 4, g)
    pages.k_gain[pages.block_table[0, 1].long()] = math.nan  # tokens 64..127
    q = torch.randn(1, 4, 1, 64, generator=g)
    out = KVCpu(isa).attend(q, pages, scale=0.125, start=int32(130), exact=True)
    assert (error(out, dense_attention(q, k64[130:], v64[130:], 0.125)) <= 1e-3).all()


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(6)
    k, v = torch.randn(2, 5000, 2, 64, generator=g)  # three splits a head
    pages, k64, v64 = packed(k, v, 4, 3, g)
    q = torch.randn(1, 6, 2, 64, generator=g)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(KVCpu(isa).attend(q, pages, scale=0.3, exact=True))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (error(found[0], dense_attention(q, k64, v64, 0.3)) <= 1e-3).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_scores_a_thousand_apart(isa: str, bits: int) -> None:
    """Chances from 1 down to where float32 ends: one token has nearly all of a query's weight, in any page."""
    g = torch.Generator().manual_seed(bits)
    k, v = torch.randn(2, 333, 2, 96, generator=g)
    pages, k64, v64 = packed(k, v, bits, bits, g)
    q = torch.randn(1, 6, 1, 96, generator=g)
    for scale in (0.1, 1.0, 30.0):
        out = KVCpu(isa).attend(q, pages, scale=scale, exact=True)
        assert (error(out, dense_attention(q, k64, v64, scale)) <= 1e-3).all(), scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_queries_and_outputs(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    k, v = torch.randn(2, 100, 1, 128, generator=g)
    pages, _, _ = packed(k, v, 4, 4, g)
    q = torch.randn(1, 2, 1, 128, generator=g).to(dtype)
    out = KVCpu(isa).attend(q, pages, scale=0.1, out_dtype=dtype)
    assert torch.equal(out, KVCpu(isa).attend(q.float(), pages, scale=0.1).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["k_gain", "v_gain"])
def test_a_gain_of_nan_reaches_its_own_head(isa: str, side: str) -> None:
    g = torch.Generator().manual_seed(8)
    k, v = torch.randn(2, 130, 2, 64, generator=g)
    pages, _, _ = packed(k, v, 4, 4, g)
    getattr(pages, side)[pages.block_table[0, 1].long(), 1, 3] = math.nan
    out = KVCpu(isa).attend(torch.randn(1, 4, 1, 64, generator=g), pages, scale=0.125)
    assert bool(out[:, 2:].isnan().all()) and bool(out[:, :2].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite(isa: str, bad: float) -> None:
    g = torch.Generator().manual_seed(9)
    pages, _, _ = packed(*torch.randn(2, 100, 1, 64, generator=g), 4, 4, g)
    q = torch.randn(1, 2, 1, 64, generator=g)
    q[0, 1, 0, 5] = bad
    out = KVCpu(isa).attend(q, pages, scale=0.125)
    assert bool(out[:, 1].isnan().all()) and bool(out[:, 0].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_append_is_encode_and_pack_bit_for_bit(isa: str, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    for head_dim, dtype, unbiased in (
        (64, torch.float32, True),
        (80, torch.bfloat16, False),
        (96, torch.float16, True),
        (128, torch.bfloat16, True),
        (72, torch.float32, False),
        (256, torch.float16, False),
    ):
        x = torch.randn(9, 3, head_dim, generator=g).to(dtype)
        x[2, 1] = 0
        x[3, 0, 1], x[4, 2, 7] = math.nan, math.inf
        x[5] *= 1e-3
        slots = torch.randperm(4 * PAGE, generator=g)[:9]
        codes = torch.full((4, 3, PAGE, packed_bytes(head_dim, bits)), 0xA5, dtype=torch.uint8)
        gain = torch.full((4, 3, PAGE), 7.0, dtype=torch.float16)
        expected_codes, expected_gain = codes.clone(), gain.clone()
        c, s = encode(x, bits, unbiased)
        expected_codes[slots // PAGE, :, slots % PAGE], expected_gain[slots // PAGE, :, slots % PAGE] = pack(c, bits), s
        KVCpu(isa).append(x, slots, codes, gain, bits, unbiased)
        assert torch.equal(codes, expected_codes), head_dim
        same = (gain == expected_gain) | (gain.isnan() & expected_gain.isnan())
        assert bool(same.all()), head_dim
        assert int(gain.isnan().sum()) == 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_rotation_is_that_of_the_format_bit_for_bit(isa: str, head_dim: int) -> None:
    g = torch.Generator().manual_seed(head_dim)
    x, mean = torch.randn(5, 4, 3, head_dim, generator=g), torch.randn(3, head_dim, generator=g)
    kernel = KVCpu(isa)
    assert torch.equal(kernel.rotate(x), rotate(x))
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert torch.equal(kernel.rotate(half, mean=mean), rotate(half.float() - mean).to(dtype))
    turned = x.transpose(0, 1)  # strides of its own
    assert torch.equal(kernel.rotate(turned), rotate(turned))
    # all at once: rotated, centered and encoded
    one = torch.zeros(1, 3, PAGE, packed_bytes(head_dim, 4), dtype=torch.uint8), torch.zeros(1, 3, PAGE).half()
    two = one[0].clone(), one[1].clone()
    slots = torch.arange(20)
    kernel.append(x.flatten(0, 1), slots, *one, 4, True, mean, rotated=False)
    kernel.append(rotate(x - mean).flatten(0, 1), slots, *two, 4, True)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_threads_do_not_change_what_is_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    x, slots = torch.randn(300, 4, 128, generator=torch.Generator().manual_seed(1)), torch.arange(300)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        codes, gain = torch.zeros(5, 4, PAGE, 64, dtype=torch.uint8), torch.zeros(5, 4, PAGE).half()
        KVCpu().append(x, slots, codes, gain, 4, True, rotated=False)
        found.append((codes, gain))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_refusals() -> None:
    g = torch.Generator().manual_seed(2)
    pages, _, _ = packed(*torch.randn(2, 70, 2, 64, generator=g), 4, 4, g)
    kernel, q = KVCpu(), torch.randn(1, 4, 1, 64, generator=g)
    with pytest.raises(ValueError, match="3 query heads over 2 kv heads"):
        kernel.attend(q[:, :3], pages, scale=1.0)
    with pytest.raises(ValueError, match="17 new tokens; 1 to 16"):
        kernel.attend(q.expand(1, 4, 17, 64), pages, scale=1.0)
    with pytest.raises(ValueError, match=r"lengths is torch.int64"):
        kernel.attend(q, Pages(*[*vars(pages).values()][:7], torch.tensor([70])), scale=1.0)
    with pytest.raises(ValueError, match="row 0 has 129 tokens in 2 pages"):
        kernel.attend(q, Pages(*[*vars(pages).values()][:7], int32(129)), scale=1.0)
    with pytest.raises(ValueError, match=r"k_codes is torch.uint8 .* needed"):
        kernel.attend(torch.randn(1, 4, 1, 72), pages, scale=1.0)
    slots = torch.tensor([4 * PAGE])
    with pytest.raises(ValueError, match="slot 256 of 4 pages"):
        kernel.append(torch.randn(1, 2, 64), slots, pages.k_codes, pages.k_gain, 4, True)
    assert "16" in str(kernel.why_not(KVFormat.parse("k16v4"), 64, 64))
    assert kernel.why_not(KVFormat.parse("k3v2"), 80, 80) is None
