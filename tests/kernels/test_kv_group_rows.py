"""Rows of the kinds to compare with: attention over them, whole groups, what crop can take back, memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels import kv_reference
from bitpalette.kernels.kv_group_rows import GroupRows, rows_class
from bitpalette.kernels.kv_kernel import FORCE_VARIABLE, choose
from bitpalette.kernels.kv_rows import KVRows, cache_bytes
from bitpalette.quant import kv_bfp, kv_channel
from bitpalette.quant.kv_format import BLOCKS, KVError, KVFormat

HEADS, GROUP, WIDTH = 2, 3, 64
CPU = torch.device("cpu")
FORMS = [
    KVFormat(2, 4, 4, 8, "channel"),
    KVFormat(3, 16, 0, 0, "channel"),
    KVFormat(16, 2, 2, 40, "channel"),
    KVFormat(4, 3, 4, 8, "bfp32"),
    KVFormat(8, 2, 0, 5, "bfp64"),
]


def tokens(n: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return k, v


def order_of(form: KVFormat) -> Tensor | None:
    generator = torch.Generator().manual_seed(9)
    return torch.stack([torch.randperm(WIDTH, generator=generator) for _ in range(HEADS)])


def rows_of(form: KVFormat, batch: int = 2, rollback: int = 0) -> GroupRows:
    order = order_of(form) if form.kind in BLOCKS else None
    return GroupRows(form, batch, HEADS, WIDTH, WIDTH, torch.bfloat16, CPU, None, rollback, order=order)


def put(rows: KVRows, k: Tensor, v: Tensor, step: int | None = None, skip: np.ndarray | None = None) -> KVRows:
    step = step or k.shape[2]
    for first in range(0, k.shape[2], step):
        part = slice(first, min(first + step, k.shape[2]))
        here = np.zeros(rows.batch, np.int64) if skip is None else np.clip(skip - first, 0, part.stop - first)
        rows.append(*rows.stored(k[:, :, part], v[:, :, part]), here)
    return rows


def attend(rows: KVRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kv_reference.attention(
        q, rows, rows.stored(k, v), np.zeros(rows.batch, np.int64), WIDTH**-0.5, dtype=torch.float64
    )


def read(form: KVFormat, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What attention should see of one row's k, v [heads, length, D] once all of it is appended."""
    group = 32 if form.kind == "channel" else 1
    packed = max(k.shape[1] - form.window - form.sinks, 0) // group * group
    part = slice(form.sinks, form.sinks + packed)
    k, v = k.float().clone(), v.float().clone()
    if not packed:
        return k, v
    if form.kind == "channel":
        if form.bits_k < 16:
            k[:, part] = kv_channel.decode_keys(*kv_channel.encode_keys(k[:, part], form.bits_k))
        if form.bits_v < 16:
            v[:, part] = kv_channel.decode_values(*kv_channel.encode_values(v[:, part], form.bits_v))
        return k, v
    block, order = BLOCKS[form.kind], order_of(form)
    for head in range(HEADS):
        at = order[head]
        codes = kv_bfp.encode(k[head, part][:, at], form.bits_k, block)
        back = torch.empty_like(k[head, part])
        back[:, at] = kv_bfp.decode(*codes, form.bits_k)
        k[head, part] = back
    v[:, part] = kv_bfp.decode(*kv_bfp.encode(v[:, part], form.bits_v, block), form.bits_v)
    return k, v


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", [(200, 63), (1, 40), (105, 104)])
@pytest.mark.parametrize("step", [None, 7])
def test_attention_is_over_what_the_format_keeps(form: KVFormat, lengths: tuple[int, int], step: int | None) -> None:
    most, n = max(lengths), 3
    k, v = tokens(most + n)
    q = torch.randn(2, HEADS * GROUP, n, WIDTH, generator=torch.Generator().manual_seed(3))
    rows = put(rows_of(form), k[:, :, :most], v[:, :, :most], step, np.array([most - length for length in lengths]))
    out = attend(rows, q, k[:, :, most:], v[:, :, most:])
    for b, length in enumerate(lengths):
        start = most - length
        its_k, its_v = read(form, k[b, :, start:most], v[b, :, start:most])
        its_k, its_v = torch.cat((its_k, k[b, :, most:]), 1), torch.cat((its_v, v[b, :, most:]), 1)
        score = q[b].double() @ its_k.double().repeat_interleave(GROUP, 0).mT / math.sqrt(WIDTH)
        seen = torch.arange(length + n) <= torch.arange(length, length + n)[:, None]
        right = score.masked_fill(~seen, -math.inf).softmax(-1) @ its_v.double().repeat_interleave(GROUP, 0)
        assert ((out[b] - right).abs() <= 1e-6).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_by_one_is_all_at_once(form: KVFormat) -> None:
    k, v = tokens(170)
    q = torch.randn(2, HEADS * GROUP, 1, WIDTH)
    outs = [attend(put(rows_of(form), k, v, step), q, k[:, :, :1], v[:, :, :1]) for step in (None, 1, 11)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("drop", [1, 20, 33])
def test_crop_within_the_ring_leaves_no_trace(form: KVFormat, drop: int) -> None:
    """rollback 64: a group that is cut still stands in the ring."""
    k, v = tokens(150)
    other = tokens(drop, seed=1)
    q = torch.randn(2, HEADS * GROUP, 1, WIDTH)
    plain = put(rows_of(form, rollback=64), k, v)
    cropped = put(rows_of(form, rollback=64), k[:, :, :105], v[:, :, :105], 5)
    put(cropped, *other, 1)
    cropped.crop(drop)
    put(cropped, k[:, :, 105:], v[:, :, 105:], 3)
    assert torch.equal(attend(plain, q, k[:, :, :1], v[:, :, :1]), attend(cropped, q, k[:, :, :1], v[:, :, :1]))


def test_a_packed_group_is_not_cut() -> None:
    k, v = tokens(150)
    rows = put(rows_of(FORMS[0]), k, v)  # packed: 4 .. 131
    for drop in (150 - 99, 150 - 37):
        with pytest.raises(KVError, match="inside 32 tokens"):
            rows.crop(drop)
    assert rows.lengths.tolist() == [150, 150]
    rows.crop(150 - 68)  # between two groups
    put(rows, k[:, :, 68:], v[:, :, 68:], 9)
    q = torch.randn(2, HEADS * GROUP, 1, WIDTH)
    fresh = put(rows_of(FORMS[0]), k, v)
    assert torch.equal(attend(rows, q, k[:, :, :1], v[:, :, :1]), attend(fresh, q, k[:, :, :1], v[:, :, :1]))
    rows.crop(148)
    assert rows.lengths.tolist() == [2, 2] and rows.table == [[], []]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_share_pages_until_one_writes(form: KVFormat) -> None:
    k, v = tokens(150)
    rows = put(rows_of(form), k, v)
    rows.select(torch.tensor([1, 1, 0]))
    more = tokens(60, batch=3, seed=5)
    put(rows, *more, 4)
    alone = put(rows_of(form, 1), k[1:], v[1:])
    put(alone, more[0][1:2], more[1][1:2])
    q = torch.randn(1, HEADS * GROUP, 1, WIDTH)
    new = more[0][:1, :, :1], more[1][:1, :, :1]
    all_rows = attend(rows, q.expand(3, -1, -1, -1), *(x.expand(3, -1, -1, -1) for x in new))
    assert torch.equal(all_rows[1:2], attend(alone, q, *new))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("n", [0, 9, 40, 170, 700])
def test_memory_is_the_formula(form: KVFormat, n: int) -> None:
    rows = rows_of(form)
    rows.reserve(n)
    if n:
        put(rows, *tokens(n), 50)
    assert rows.nbytes == cache_bytes(form, n, 2, HEADS, WIDTH)


def test_bits_are_the_bytes() -> None:
    """What 64 more tokens take is what `bits_per_element` says."""
    for form in (f for f in FORMS if 16 not in (f.bits_k, f.bits_v)):
        page = cache_bytes(form, 704, 1, HEADS, WIDTH) - cache_bytes(form, 640, 1, HEADS, WIDTH)
        assert 8 * page / (64 * HEADS * 2 * WIDTH) == form.bits_per_element(WIDTH)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    channel, blocks = FORMS[0], FORMS[3]
    shape = (2, HEADS, WIDTH, WIDTH, torch.bfloat16, CPU)
    assert rows_class(channel) is GroupRows and rows_class(KVFormat()) is KVRows
    with pytest.raises(KVError, match="KVRows does not hold"):
        KVRows(channel, *shape)
    with pytest.raises(KVError, match="not centered"):
        GroupRows(channel, *shape, torch.zeros(HEADS, WIDTH))
    with pytest.raises(KVError, match="no order"):
        GroupRows(channel, *shape, order=order_of(blocks))
    with pytest.raises(KVError, match="once a head"):
        GroupRows(blocks, *shape, order=torch.zeros(HEADS, WIDTH, dtype=torch.int64))
    with pytest.raises(KVError, match="steps of 32, not 80"):
        GroupRows(channel, 2, HEADS, 80, 80, torch.bfloat16, CPU)
    with pytest.raises(KVError, match="'bfp32' need a head_dim in steps of 32, not 80"):
        GroupRows(blocks, 2, HEADS, 80, 80, torch.bfloat16, CPU)
    assert choose(channel, WIDTH, WIDTH, CPU) is None
    monkeypatch.setenv(FORCE_VARIABLE, "cpu")
    with pytest.raises(KVError, match="for comparison"):
        choose(channel, WIDTH, WIDTH, CPU)
