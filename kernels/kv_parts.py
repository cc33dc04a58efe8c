"""A layer's cache (`kv_rows.KVRows`) as attention kernels take it: pages, and three parts that are kept in 16 bits."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kv_cpu import Dense, Pages
from .kv_rows import KVRows


def parts_of(
    rows: KVRows, new: tuple[Tensor, Tensor] | None, skip: NDArray[np.int64], n: int
) -> tuple[Pages, Dense | None, Dense | None, Dense | None]:
    """(pages, sinks, window, fresh tokens); None for a part that the cache has no room for, or no `new` tokens.

    new: keys and values [batch, n, kv_heads, D] of `KVRows.stored`, not yet appended, of which the first skip[b] are
    padding. Both sides of the cache have codes. Lengths and first slots go to the device in one copy.
    """
    form, pool = rows.form, rows.pool
    assert pool.keys.gain is not None and pool.values.gain is not None
    start = rows.exact_start
    numbers = np.stack(
        (
            np.maximum(start - form.sinks, 0),
            np.minimum(rows.lengths, form.sinks),
            np.maximum(rows.lengths - start, 0),
            start % max(rows.capacity, 1),
            n - skip,
            np.minimum(skip, n - 1),
        )
    )
    stored, in_sinks, in_window, window_first, in_fresh, fresh_first = torch.from_numpy(numbers.astype(np.int32)).to(
        rows.device
    )
    codes = (pool.keys.codes, pool.keys.gain, pool.values.codes, pool.values.gain)
    pages = Pages(*codes, form.bits_k, form.bits_v, rows.block_table, stored)
    sinks = Dense(rows.sink_k, rows.sink_v, in_sinks) if form.sinks else None
    window = Dense(rows.ring_k, rows.ring_v, in_window, window_first) if rows.capacity else None
    fresh = None if new is None else Dense(*new, in_fresh, fresh_first)
    return pages, sinks, window, fresh
