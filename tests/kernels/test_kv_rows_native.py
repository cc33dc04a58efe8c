"""Rows whose bookkeeping is native code's are those of torch's, bit for bit, whatever is done to them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpalette.kernels.kv_cpu import KVCpu
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.native import available_isas, why_no_cpu_module

pytestmark = pytest.mark.skipif(why_no_cpu_module() is not None, reason="the native module is not built")

CPU = torch.device("cpu")
HEADS, WIDTH, WIDTH_V = 2, 16, 24


def twins(form: KVFormat, batch: int, dtype: torch.dtype, rollback: int, isa: str | None = None) -> list[KVRows]:
    mean = torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(5))
    return [
        KVRows(form, batch, HEADS, WIDTH, WIDTH_V, dtype, CPU, mean, rollback, encoder)
        for encoder in (None, KVCpu(isa))
    ]


def check_same(plain: KVRows, native: KVRows) -> None:
    for name in ("lengths", "quantized", "exact_from", "exact_start"):
        assert getattr(plain, name).tolist() == getattr(native, name).tolist(), name
    sinks, window = plain.form.sinks, plain.form.window
    for row, length in enumerate(plain.lengths.tolist()):
        held = min(length, sinks)
        assert torch.equal(plain.sink_k[row, :held], native.sink_k[row, :held])
        assert torch.equal(plain.sink_v[row, :held], native.sink_v[row, :held])
        assert len(plain.table[row]) == len(native.table[row])
        used = int(plain.quantized[row]) - sinks
        if used == 0:
            continue
        for side in ("keys", "values"):
            read = [getattr(rows.pool, side).read(torch.tensor([rows.table[row]]).long()) for rows in (plain, native)]
            assert torch.equal(read[0][:, :, :used], read[1][:, :, :used])
    if window or plain.capacity:
        for a, b in zip(plain.window_tokens(), native.window_tokens(), strict=True):
            assert torch.equal(a, b)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 5, 63, 64, 65, 150])),
        st.tuples(st.just("crop"), st.sampled_from([0, 1, 7, 70, 1000])),
        st.tuples(st.just("repeat"), st.sampled_from([1, 2])),
        st.tuples(st.just("select"), st.integers(0, 3)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("rollback"), st.sampled_from([4, 40])),
    ),
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 3, 4, 8])),
    sinks=st.sampled_from([0, 4]),
    window=st.sampled_from([0, 8, 64]),
    rollback=st.sampled_from([0, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.sampled_from([0, 3]),
    steps=STEPS,
    seed=st.integers(0, 2**20),
)
def test_any_history(bits, sinks, window, rollback, dtype, padding, steps, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    pair = twins(KVFormat(*bits, sinks, window), 2, dtype, rollback)
    skip = np.array([0, padding])
    for step, argument in [("append", 5), *steps]:
        batch = pair[0].batch
        if step == "append":
            k = torch.randn(batch, HEADS, argument, WIDTH, generator=g).to(dtype)
            v = torch.randn(batch, argument, HEADS, WIDTH_V, generator=g).to(dtype).transpose(1, 2)
            stored = [rows.stored(k, v) for rows in pair]
            for a, b in zip(*stored, strict=True):
                assert torch.equal(a, b)
            for rows, new in zip(pair, stored, strict=True):
                rows.append(*new, skip)
            skip = np.zeros(batch, np.int64)
        elif step == "crop":
            for rows in pair:
                rows.crop(argument)
        elif step == "repeat" and batch <= 2:
            for rows in pair:
                rows.repeat(argument)
        elif step == "select":
            at = torch.tensor([argument % batch, 0])
            for rows in pair:
                rows.select(at)
        elif step == "copy":
            old, pair = pair, [copy.deepcopy(rows) for rows in pair]
            for rows in old:  # a copy that still wrote there would show
                for t in (rows.ring_k, rows.ring_v, rows.sink_k, rows.sink_v):
                    t.fill_(7)
        elif step == "rollback":
            for rows in pair:
                rows.grow_rollback(argument)
        skip = np.zeros(pair[0].batch, np.int64)
        check_same(*pair)


@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set_appends_the_same_bits(isa: str) -> None:
    g = torch.Generator().manual_seed(3)
    pair = twins(KVFormat(3, 2, 4, 8), 2, torch.bfloat16, 0, isa)
    for n in (70, 1, 1, 30, 1):
        k, v = torch.randn(2, HEADS, n, WIDTH, generator=g), torch.randn(2, HEADS, n, WIDTH_V, generator=g)
        for rows in pair:
            rows.append(*rows.stored(k.bfloat16(), v.bfloat16()), np.zeros(2, np.int64))
        check_same(*pair)
