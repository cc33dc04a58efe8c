"""Attention over the packed KV cache by Triton, against float64 on the same decoded values."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels.kv_parts import Dense, Pages
from bitpalette.kernels.kv_reference import attention
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.kernels.kv_triton import KVLaunch, KVTriton
from bitpalette.quant.kv_format import PAGE, KVFormat
from bitpalette.quant.kv_token import decode, encode, pack, packed_bytes

BITS = (2, 3, 4, 8)
# head_dim, query heads of a kv head, tokens in pages, new tokens; all pairs of bits take them in turn
SHAPES = (
    (64, 1, 200, 1),
    (80, 3, 65, 4),
    (128, 4, 63, 1),
    (64, 8, 1, 4),
    (72, 2, 64, 1),
    (128, 7, 200, 1),
    (96, 5, 65, 1),
    (64, 3, 0, 4),
    (256, 1, 65, 1),
    (8, 2, 130, 2),
)
CASES = [(*pair, *SHAPES[i % len(SHAPES)]) for i, pair in enumerate(itertools.product(BITS, BITS))]
SPLIT = KVLaunch(block_t=16, splits=3, warps=4, stages=2)


def int32(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def packed(k: Tensor, v: Tensor, bits_k: int, bits_v: int, device: torch.device) -> tuple[Pages, Tensor, Tensor]:
    """Pages of one row with k, v [tokens, heads, D] in a shuffled order, rubbish and NaN elsewhere; decoded k, v."""
    tokens, heads, _ = k.shape
    used = -(-tokens // PAGE)
    table = torch.randperm(used + 2)[:used]
    at, slot = table[torch.arange(tokens) // PAGE], torch.arange(tokens) % PAGE
    sides: list[Tensor] = []
    for x, bits, unbiased in ((k, bits_k, True), (v, bits_v, False)):
        codes, gain = encode(x, bits, unbiased)
        row = pack(codes, bits) if tokens else codes[..., : packed_bytes(x.shape[-1], bits)]
        rows = torch.randint(0, 256, (used + 2, heads, PAGE, packed_bytes(x.shape[-1], bits)), dtype=torch.uint8)
        gains = torch.full((used + 2, heads, PAGE), math.nan, dtype=torch.float16)
        rows[at, :, slot], gains[at, :, slot] = row, gain
        sides += [rows.to(device), gains.to(device), decode(codes, gain, bits).double()]
    kc, kg, k64, vc, vg, v64 = sides
    return Pages(kc, kg, vc, vg, bits_k, bits_v, table.int()[None].to(device), int32(device, tokens)), k64, v64


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """float64 [1, heads, n, D] on the CPU; k, v [tokens, kv_heads, D]."""
    n, tokens = q.shape[2], k.shape[0]
    grouped = q[0].cpu().double().unflatten(0, (k.shape[1], -1))
    score = grouped @ k.transpose(0, 1)[:, None].mT * scale
    position = tokens - n + torch.arange(n)
    score = score.masked_fill(torch.arange(tokens) > position[:, None], -math.inf)
    return (score.softmax(-1) @ v.transpose(0, 1)[:, None]).flatten(0, 1)[None]


def error(out: Tensor, ref: Tensor) -> Tensor:
    return (out.cpu().double() - ref.cpu()).norm(dim=-1) / ref.cpu().norm(dim=-1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c[0]}v{c[1]}-D{c[2]}-group{c[3]}-{c[4]}+{c[5]}")
def test_attention_is_that_of_the_decoded_cache(case: tuple[int, ...], device: torch.device) -> None:
    bits_k, bits_v, head_dim, group, tokens, n = case
    torch.manual_seed(bits_k * 16 + bits_v)
    k, v = torch.randn(2, tokens, 2, head_dim)
    pages, k64, v64 = packed(k, v, bits_k, bits_v, device)
    new = Dense(*(torch.randn(1, n, 2, head_dim, device=device).bfloat16() for _ in range(2)), int32(device, n))
    q = torch.randn(1, 2 * group, n, head_dim, device=device)
    out = KVTriton().attend(q, pages, fresh=new, scale=head_dim**-0.5)
    keys, values = (torch.cat((x, y[0].cpu().double())) for x, y in ((k64, new.keys), (v64, new.values)))
    assert (error(out, dense_attention(q, keys, values, head_dim**-0.5)) <= 1e-3).all()


def cache(text: str, dtype: torch.dtype, device: torch.device) -> KVRows:
    """Three rows of different lengths, padded on the left, with sinks and a ring that has gone round."""
    rows = KVRows(KVFormat.parse(text, sinks=4, window=10), 3, 2, 64, 64, dtype, device)
    new = rows.stored(*torch.randn(2, 3, 2, 150, 64, device=device))
    rows.append(*new, np.array([0, 60, 148]))
    for _ in range(3):
        rows.append(*rows.stored(*torch.randn(2, 3, 2, 1, 64, device=device)), np.zeros(3, np.int64))
    return rows


@pytest.mark.parametrize(
    ("text", "dtype", "n", "options", "appended"),
    [
        ("k4v4", torch.float16, 1, {}, False),
        ("k2v3", torch.bfloat16, 5, {"softcap": 3.0}, False),
        ("k8v8", torch.float16, 5, {"sliding_window": 40}, True),
        ("k4v2", torch.float32, 3, {"sliding_window": 7}, False),
        ("k3v4", torch.bfloat16, 1, {"sink_logits": True}, True),
    ],
)
def test_whole_caches_are_as_the_reference_has_them(
    text: str, dtype: torch.dtype, n: int, options: dict[str, object], appended: bool, device: torch.device
) -> None:
    torch.manual_seed(n)
    rows = cache(text, dtype, device)
    q, none = torch.randn(3, 8, n, 64, device=device), np.zeros(3, np.int64)
    new = None if appended else rows.stored(*torch.randn(2, 3, 2, n, 64, device=device))
    if "sink_logits" in options:
        options = {"sink_logits": torch.randn(8, device=device)}
    ref = attention(q, rows, new, none, 0.125, dtype=torch.float64, **options)  # type: ignore[arg-type]
    out = KVTriton().attention(q, rows, new, none, 0.125, **options)  # type: ignore[arg-type]
    assert (error(out, ref) <= 1e-3).all()


def test_padding_sees_nothing_and_is_zero(device: torch.device) -> None:
    torch.manual_seed(4)
    rows = KVRows(KVFormat.parse("k4v4", sinks=2, window=3), 2, 1, 64, 64, torch.bfloat16, device)
    q, skip = torch.randn(2, 2, 6, 64, device=device), np.array([0, 4])
    new = rows.stored(*torch.randn(2, 2, 1, 6, 64, device=device))
    new[0][1, :4], new[1][1, :4] = math.nan, math.nan
    out = KVTriton().attention(q, rows, new, skip, 0.125)
    assert bool((out[1, :, :4] == 0).all())
    new[0][1, :4], new[1][1, :4] = 0, 0
    ref = attention(q, rows, new, skip, 0.125, dtype=torch.float64)
    seen = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])[:, None].expand(2, 2, 6)
    assert (error(out.cpu()[seen], ref.cpu()[seen]) <= 1e-3).all()


def test_nothing_at_all_is_zero(device: torch.device) -> None:
    pages, _, _ = packed(*torch.randn(2, 0, 1, 64), 4, 4, device)
    assert bool((KVTriton().attend(torch.randn(1, 2, 1, 64, device=device), pages, scale=1.0) == 0).all())


def test_positions_before_start_are_not_seen(device: torch.device) -> None:
    torch.manual_seed(5)
    pages, k64, v64 = packed(*torch.randn(2, 300, 1, 64), 4, 4, device)
    for gain in (pages.k_gain, pages.v_gain):
        gain[pages.block_table[0, 1].long()] = math.nan  # tokens 64..127
    q = torch.randn(1, 2, 1, 64, device=device)
    out = KVTriton().attend(q, pages, scale=0.125, start=int32(device, 130), launch=SPLIT)
    assert (error(out, dense_attention(q, k64[130:], v64[130:], 0.125)) <= 1e-3).all()


def test_splits_and_blocks_of_rows(device: torch.device) -> None:
    """Splits with pages and without; 3 query heads and 7 new tokens are two programs, one of them not full."""
    torch.manual_seed(6)
    pages, k64, v64 = packed(*torch.randn(2, 150, 1, 64), 4, 3, device)
    new = Dense(*(torch.randn(1, 7, 1, 64, device=device).half() for _ in range(2)), int32(device, 7))
    q = torch.randn(1, 3, 7, 64, device=device)
    keys, values = (torch.cat((x, y[0].cpu().double())) for x, y in ((k64, new.keys), (v64, new.values)))
    ref = dense_attention(q, keys, values, 0.3)
    for launch in (None, dataclasses.replace(SPLIT, splits=5)):
        assert (error(KVTriton().attend(q, pages, fresh=new, scale=0.3, launch=launch), ref) <= 1e-3).all(), launch


def test_16_bit_queries_and_outputs_and_the_same_bits_again(device: torch.device) -> None:
    torch.manual_seed(7)
    pages, _, _ = packed(*torch.randn(2, 100, 1, 64), 4, 4, device)
    q, kernel = torch.randn(1, 2, 1, 64, device=device), KVTriton()
    for dtype in (torch.float16, torch.bfloat16):
        out = kernel.attend(q.to(dtype), pages, scale=0.1, out_dtype=dtype, launch=SPLIT)
        assert torch.equal(out, kernel.attend(q.to(dtype).float(), pages, scale=0.1, launch=SPLIT).to(dtype))


@pytest.mark.parametrize("side", ["k_gain", "v_gain"])
def test_a_gain_of_nan_reaches_its_own_head(side: str, device: torch.device) -> None:
    torch.manual_seed(8)
    pages, _, _ = packed(*torch.randn(2, 130, 2, 64), 4, 4, device)
    getattr(pages, side)[pages.block_table[0, 1].long(), 1, 3] = math.nan
    out = KVTriton().attend(torch.randn(1, 4, 1, 64, device=device), pages, scale=0.125)
    assert bool(out[:, 2:].isnan().all()) and bool(out[:, :2].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite(bad: float, device: torch.device) -> None:
    torch.manual_seed(9)
    pages, _, _ = packed(*torch.randn(2, 100, 1, 64), 4, 4, device)
    q = torch.randn(1, 2, 1, 64, device=device)
    q[0, 1, 0, 5] = bad
    out = KVTriton().attend(q, pages, scale=0.125)
    assert bool(out[:, 1].isnan().all()) and bool(out[:, 0].isfinite().all())


def test_sizes_of_gains_and_queries(device: torch.device) -> None:
    """Values from 1e-5 to 1e4 and zeros, queries beyond float16's range: no overflow, no lost weight."""
    torch.manual_seed(10)
    k, v = torch.randn(2, 100, 1, 64)
    v *= torch.logspace(-5, 4, 100)[:, None, None]
    v[7:9] = 0
    pages, k64, v64 = packed(k, v, 4, 4, device)
    q = torch.randn(1, 2, 1, 64, device=device) * torch.tensor([1e6, 1e-6], device=device)[None, :, None, None]
    out = KVTriton().attend(q, pages, scale=1e-6)
    assert (error(out, dense_attention(q, k64, v64, 1e-6)) <= 1e-3).all()
    pages.v_gain[:] = 0
    assert bool((KVTriton().attend(q, pages, scale=1e-6) == 0).all())


def test_refusals(device: torch.device) -> None:
    pages, _, _ = packed(*torch.randn(2, 70, 2, 64), 4, 4, device)
    kernel, q = KVTriton(), torch.randn(1, 4, 1, 64, device=device)
    with pytest.raises(ValueError, match="3 query heads over 2 kv heads"):
        kernel.attend(q[:, :3], pages, scale=1.0)
    with pytest.raises(ValueError, match="17 new tokens; 1 to 16"):
        kernel.attend(q.expand(1, 4, 17, 64), pages, scale=1.0)
    with pytest.raises(ValueError, match=r"lengths is torch.int64"):
        kernel.attend(q, dataclasses.replace(pages, lengths=pages.lengths.long()), scale=1.0)
    with pytest.raises(ValueError, match=r"k_codes is torch.uint8 .* needed"):
        kernel.attend(torch.randn(1, 4, 1, 72, device=device), pages, scale=1.0)
    assert kernel.why_not(KVFormat.parse("k3v2"), 80, 80) is None
    assert "16" in str(kernel.why_not(KVFormat.parse("k16v4"), 64, 64))
    assert "320" in str(kernel.why_not(KVFormat.parse("k4v4"), 320, 64))


def test_a_graph_reads_lengths_and_tables_again(device: torch.device) -> None:
    if device.type != "cuda":
        return  # the interpreter has no graphs; `test_triton_kernels.py` allows no skips
    torch.manual_seed(11)
    pages, k64, v64 = packed(*torch.randn(2, 300, 2, 64), 4, 4, device)
    q, kernel = torch.randn(1, 8, 1, 64, device=device), KVTriton()
    kernel.attend(q, pages, scale=0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.attend(q, pages, scale=0.125)
    for tokens in (300, 65, 1):
        pages.lengths.fill_(tokens)
        q.normal_()
        graph.replay()
        assert (error(out, dense_attention(q, k64[:tokens], v64[:tokens], 0.125)) <= 1e-3).all()
