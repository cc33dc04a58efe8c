"""Rows of a cache in pages: every token is quantized once and the same way however it came; crop, select and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels import kv_pages
from bitpalette.kernels.kv_rows import KVRows, cache_bytes, pages_of
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_token import decode, encode, rotate

HEADS, WIDTH = 2, 16
FORMS = [KVFormat(4, 2, 4, 8), KVFormat(3, 3, 0, 0), KVFormat(16, 4, 2, 64), KVFormat(2, 8, 70, 5)]


def tokens(n: int, batch: int = 2, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, HEADS, n, width, generator=generator)
    return k, v


def rows_of(form: KVFormat, batch: int = 2, rollback: int = 0, mean: Tensor | None = None) -> KVRows:
    return KVRows(form, batch, HEADS, WIDTH, WIDTH, torch.bfloat16, torch.device("cpu"), mean, rollback)


def put(rows: KVRows, k: Tensor, v: Tensor, step: int | None = None, skip: np.ndarray | None = None) -> KVRows:
    step = step or k.shape[2]
    for first in range(0, k.shape[2], step):
        part = slice(first, min(first + step, k.shape[2]))
        here = np.zeros(rows.batch, np.int64)
        if skip is not None:
            here = np.clip(skip - first, 0, part.stop - first)
        rows.append(*rows.stored(k[:, :, part], v[:, :, part]), here)
    return rows


def contents(rows: KVRows) -> list[tuple[Tensor, ...]]:
    """What each row reads, by a path of its own: sinks, packed pages, window, in order."""
    found = []
    for r in range(rows.batch):
        length, start = int(rows.lengths[r]), int(rows.exact_start[r])
        sinks = min(length, rows.form.sinks)
        parts = [rows.sink_k[r, :sinks], rows.sink_v[r, :sinks]]
        for side in (rows.pool.keys, rows.pool.values):
            for t in side.tensors():
                at = [t[rows.table[r][i // 64], :, i % 64] for i in range(max(start - rows.form.sinks, 0))]
                parts.append(torch.stack(at) if at else t.new_zeros(0))
        for ring in (rows.ring_k, rows.ring_v):
            parts.append(torch.stack([ring[r, i % ring.shape[1]] for i in range(start, length)] or [torch.zeros(0)]))
        found.append(tuple(parts))
    return found


def same(a: KVRows, b: KVRows) -> bool:
    return all(
        torch.equal(x, y)
        for one, other in zip(contents(a), contents(b), strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 140])
@pytest.mark.parametrize("step", [1, 7])
def test_one_by_one_is_all_at_once(form: KVFormat, n: int, step: int) -> None:
    k, v = tokens(n)
    skip = np.array([0, min(n, 9)])
    bulk, slow = put(rows_of(form), k, v, skip=skip), put(rows_of(form), k, v, step, skip)
    assert bulk.lengths.tolist() == slow.lengths.tolist() == [n, n - skip[1]]
    assert same(bulk, slow)


def test_pages_hold_the_format() -> None:
    form, mean = KVFormat(3, 4, 4, 8), torch.randn(HEADS, WIDTH)
    k, v = tokens(100)
    rows = put(rows_of(form, mean=mean), k, v)
    z = rotate(k.transpose(1, 2) - mean).bfloat16()
    codes, gain = encode(z[1, 4:92], 3, unbiased=True)
    read = rows.pool.keys.read(torch.tensor([rows.table[1]]))[0, :, :88].transpose(0, 1)
    assert torch.equal(read, decode(codes, gain, 3))
    assert torch.equal(rows.sink_k[1], z[1, :4])
    window = rows.window_tokens()
    assert torch.equal(window[0][1], z[1, 92:]) and window[2][1].tolist() == list(range(92, 100))
    assert [len(pages) for pages in rows.table] == [2, 2] == [pages_of(form, 100)] * 2


def test_every_token_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = [0], kv_pages.encode

    def counting(z: Tensor, bits: int, unbiased: bool) -> tuple[Tensor, Tensor]:
        count[0] += len(z) if unbiased else 0
        return real(z, bits, unbiased)

    monkeypatch.setattr(kv_pages, "encode", counting)
    put(rows_of(KVFormat(4, 4, 4, 8)), *tokens(150), step=1)
    assert count[0] == 2 * (150 - 4 - 8)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("drop", [1, 6, 16])
def test_crop_leaves_no_trace(form: KVFormat, drop: int) -> None:
    k, v = tokens(120)
    other = tokens(drop, seed=1)
    plain = put(rows_of(form, rollback=16), k, v)
    cropped = put(rows_of(form, rollback=16), k[:, :, :80], v[:, :, :80], 5)
    put(cropped, *other, 1)
    cropped.crop(drop)
    assert same(cropped, put(rows_of(form, rollback=16), k[:, :, :80], v[:, :, :80]))
    put(cropped, k[:, :, 80:], v[:, :, 80:], 3)
    assert same(cropped, plain)


def test_crop_past_the_ring_reads_what_is_left() -> None:
    k, v = tokens(120)
    form = KVFormat(4, 4, 4, 8)
    rows = put(rows_of(form), k, v)
    rows.crop(50)
    assert rows.lengths.tolist() == [70, 70] == rows.exact_start.tolist()  # nothing is left in the window
    put(rows, k[:, :, 70:], v[:, :, 70:], 1)
    assert same(rows, put(rows_of(form), k, v))
    rows.crop(118)
    assert rows.lengths.tolist() == [2, 2] and rows.table == [[], []] and len(rows.pool.free) == rows.pool.pages
    rows.crop(7)
    assert rows.lengths.tolist() == [0, 0]
    assert same(put(rows, k, v), put(rows_of(form), k, v))


def test_reset_and_a_larger_ring() -> None:
    k, v = tokens(90)
    form = KVFormat(4, 4, 4, 8)
    rows = put(rows_of(form), k, v)
    rows.reset()
    assert same(rows, rows_of(form))
    put(rows, k[:, :, :50], v[:, :, :50])
    rows.grow_rollback(20)
    put(rows, k[:, :, 50:], v[:, :, 50:], 3)
    assert same(rows, put(rows_of(form), k, v)) and rows.capacity == 28
    rows.crop(20)
    assert same(rows, put(rows_of(form), k[:, :, :70], v[:, :, :70]))


def test_select_shares_pages_and_copies_before_a_write() -> None:
    k, v = tokens(100)
    form = KVFormat(4, 4, 4, 8)
    rows = put(rows_of(form), k, v)
    pages = rows.pool.pages
    rows.select(torch.tensor([1, 1, 0]))
    assert rows.pool.pages == pages and rows.batch == 3
    index = torch.tensor([1, 1, 0])
    more_k, more_v = tokens(30, batch=3, seed=2)
    put(rows, more_k, more_v, 1)
    expected = put(rows_of(form, 3), torch.cat((k[index], more_k), 2), torch.cat((v[index], more_v), 2))
    assert same(rows, expected)
    first = [pages[0] for pages in rows.table]
    assert first[0] == first[1] and len({pages[1] for pages in rows.table}) == 3
    rows.select(torch.tensor([2]))
    assert sum(rows.pool.users) == len(rows.table[0])


def test_repeat() -> None:
    k, v = tokens(80)
    form = KVFormat(2, 2, 4, 8)
    rows = put(rows_of(form), k, v)
    rows.repeat(2)
    assert same(rows, put(rows_of(form, 4), k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_memory_is_the_formula(form: KVFormat) -> None:
    rows = rows_of(form, rollback=3)
    rows.reserve(700)
    expected = cache_bytes(form, 700, 2, HEADS, WIDTH, rollback=3)
    assert rows.nbytes == expected
    put(rows, *tokens(700))
    assert rows.nbytes == expected
    grown = put(rows_of(form, rollback=3), *tokens(700), 1)
    assert expected <= grown.nbytes <= expected * 1.0626


def test_memory_against_sixteen_bits() -> None:
    """The shape of Llama 3.1 8B: 8 heads of 128."""
    for name, least in (("k4v4", 3.7), ("k3v3", 4.9), ("k2v2", 7.0)):
        for n in (8192, 32768):
            assert 2 * 2 * 8 * 128 * n / cache_bytes(KVFormat.parse(name), n, 1, 8, 128) >= least, (name, n)


def test_block_table_and_refusals() -> None:
    rows = put(rows_of(KVFormat(4, 4, 0, 0)), *tokens(70), skip=np.array([0, 10]))
    assert rows.block_table.tolist() == [[0, 1], [2, -1]] and rows.block_table.dtype == torch.int32
    with pytest.raises(KVError, match="pad on the left"):
        put(rows, *tokens(3), skip=np.array([0, 1]))
    with pytest.raises(KVError, match=r"\[2, 8\]"):
        rows_of(KVFormat(4, 4), mean=torch.zeros(2, 8))
    with pytest.raises(KVError, match="in steps of 8"):
        KVRows(KVFormat(4, 4), 1, 2, 20, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(KVError, match="channel"):
        rows_of(KVFormat(4, 4, kind="channel"))
