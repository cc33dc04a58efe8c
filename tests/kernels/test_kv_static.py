"""The cache in tensors of fixed size: what is done without the host knowing a length is what is done with it, and the
operators are what torch.compile takes them for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpalette.kernels import kv_static
from bitpalette.kernels.kv_cpu import KVCpu
from bitpalette.kernels.kv_rows import KVRows, cache_bytes
from bitpalette.kernels.kv_static import StaticState
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.native import why_no_cpu_module

pytestmark = pytest.mark.skipif(why_no_cpu_module() is not None, reason="needs the native CPU module")

HEADS, WIDTH, WIDTH_V, TOKENS = 2, 16, 24, 200
CPU = torch.device("cpu")


class DeviceLike(KVCpu):
    """The CPU's kernel with what kernels of devices do in addition: a slot of -1 is nothing to write."""

    def append(self, x: Tensor, slots: Tensor, *rest: Any, **options: Any) -> None:
        super().append(x[slots >= 0], slots[slots >= 0], *rest, **options)


def state_of(form: KVFormat, batch: int, rollback: int = 0) -> StaticState:
    return StaticState.allocate(form, TOKENS, batch, HEADS, WIDTH, WIDTH_V, torch.float32, CPU, rollback)


def tokens(n: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """query [batch, heads, n, D], k, v [batch, n, kv_heads, D]."""
    return (
        torch.randn(batch, 2 * HEADS, n, WIDTH, generator=generator),
        torch.randn(batch, n, HEADS, WIDTH, generator=generator),
        torch.randn(batch, n, HEADS, WIDTH_V, generator=generator),
    )


def mask_of(real: Tensor, total: int) -> Tensor:
    """uint8 [batch, 1, 1, TOKENS]: the last real[b] of `total` tokens."""
    place = torch.arange(TOKENS)
    return ((place >= total - real[:, None]) & (place < total)).to(torch.uint8)[:, None, None]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([(4, 4), (3, 2), (8, 8), (2, 3)]),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 1, 3, 16, 17, 70]),
    rollback=st.sampled_from([0, 4]),
    steps=st.lists(st.integers(1, 16), min_size=1, max_size=9),
    padding=st.integers(0, 20),
    crop=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_without_the_host(
    bits: tuple[int, int],
    sinks: int,
    window: int,
    rollback: int,
    steps: list[int],
    padding: int,
    crop: int,
    seed: int,
) -> None:
    form, kernel, generator = KVFormat(*bits, sinks, window), DeviceLike(), torch.Generator().manual_seed(seed)
    host, device = state_of(form, 2, rollback), state_of(form, 2, rollback)
    numbers, total = kv_static.format_numbers(form), 0
    padding = min(padding, steps[0] - 1)
    for turn, n in enumerate(steps):
        query, k, v = tokens(n, 2, generator)
        total += n
        mask = mask_of(torch.tensor([total, total - padding]), total) if padding else None
        right = kv_static.attend(query, k, v, mask, list(host), numbers, "cpu", 0.3, None, None, None)
        kv_static.append(k, v, mask, list(host), numbers, "cpu")
        skip = kv_static.padding_on_device(mask, device.lengths, n)
        found = kv_static.attend_on_device(kernel, query, k, v, skip, device, form, 0.3).transpose(1, 2)
        kv_static.append_on_device(kernel, k, v, skip, device, form)
        assert ((found - right).abs() <= 1e-5).all()
        for name, ours, theirs in zip(StaticState._fields, device, host, strict=True):
            assert torch.equal(ours, theirs), (name, turn)
        if turn == len(steps) // 2 and total - padding > crop:
            total -= crop
            for state in (host, device):
                state.crop(form, crop)


def test_the_same_as_growing_rows() -> None:
    form, generator, kernel = KVFormat(3, 2, 4, 8), torch.Generator().manual_seed(0), KVCpu()
    rows = KVRows(form, 2, HEADS, WIDTH, WIDTH_V, torch.float32, CPU, encoder=kernel)
    state, numbers = state_of(form, 2), kv_static.format_numbers(form)
    none = torch.zeros(2, dtype=torch.int64).numpy()
    for n in (30, 1, 1, 16, 90, 1):
        query, k, v = tokens(n, 2, generator)
        if n <= kernel.most_tokens:
            right = kernel.attention(query, rows, (k, v), none, 0.3).transpose(1, 2)
            found = kv_static.attend(query, k, v, None, list(state), numbers, "cpu", 0.3, None, None, None)
            assert torch.equal(found, right)
        rows.append(k, v, none)
        kv_static.append(k, v, None, list(state), numbers, "cpu")
    assert state.lengths.tolist() == rows.lengths.tolist() == [139, 139]
    assert torch.equal(state.ring_k, rows.ring_k) and torch.equal(state.sink_v, rows.sink_v)
    used = int(rows.quantized[0]) - form.sinks
    for row, pages in enumerate(rows.table):
        for ours, theirs in ((state.k_codes, rows.pool.keys.codes), (state.v_gain, rows.pool.values.gain)):
            assert theirs is not None
            mine = ours.view(2, -1, *ours.shape[1:])[row].transpose(1, 2).flatten(0, 1)[:used]
            assert torch.equal(mine, theirs[pages].transpose(1, 2).flatten(0, 1)[:used])


def test_bytes() -> None:
    form = KVFormat(3, 2, 4, 8)
    numbers = 3 * 8 * 2 + 4 * 2 * state_of(form, 2).block_table.shape[1]
    assert state_of(form, 2).nbytes == cache_bytes(form, TOKENS, 2, HEADS, WIDTH, WIDTH_V, 4) + numbers


def test_operators_are_what_they_say() -> None:
    """Schemas, fake tensors and functionalization, as torch checks them."""
    form, generator = KVFormat(4, 4, 2, 4), torch.Generator().manual_seed(0)
    state, numbers = state_of(form, 2), kv_static.format_numbers(form)
    query, k, v = tokens(30, 2, generator)
    mask = mask_of(torch.tensor([30, 22]), 30)
    torch.library.opcheck(kv_static.store, (query, None, "cpu"))
    torch.library.opcheck(kv_static.store, (query, torch.randn(2 * HEADS, WIDTH), "reference"))
    for kernel in ("cpu", "reference"):
        state = state_of(form, 2)
        torch.library.opcheck(kv_static.append, (k, v, mask, list(state), numbers, kernel))
        rest = (numbers, kernel, 0.3, 20.0, 9, torch.randn(2 * HEADS))
        torch.library.opcheck(kv_static.attend, (query, k, v, mask, list(state), *rest))


def test_refusals() -> None:
    form, generator = KVFormat(4, 4, 2, 4), torch.Generator().manual_seed(0)
    state, numbers = state_of(form, 2), kv_static.format_numbers(form)
    _, k, v = tokens(150, 2, generator)
    kv_static.append(k, v, None, list(state), numbers, "cpu")
    with pytest.raises(KVError, match="say tokens="):
        kv_static.append(k, v, None, list(state), numbers, "cpu")
    skip = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="more tokens than a static cache has room for"):
        kv_static.append_on_device(DeviceLike(), k, v, skip, state, form)
    for real, words in ((torch.tensor([155, 154]), "tells of"), (torch.tensor([160, 160]), "tells of")):
        with pytest.raises(KVError, match=words):
            kv_static.append(k[:, :5], v[:, :5], mask_of(real, 160), list(state), numbers, "cpu")
    holes = mask_of(torch.tensor([155, 155]), 155)
    holes[0, 0, 0, 7] = 0
    with pytest.raises(KVError, match="not left padding"):
        kv_static.append(k[:, :5], v[:, :5], holes, list(state), numbers, "cpu")
