"""Device code: weights as float16, bfloat16 or float32, all of them or some rows.

A weight is found by its row and column; the eight that share a word find it in the first cache. The words come from
memory once, and what is written takes four times as long as they do or more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_words, value_pair


@triton.jit
def weights_at(
    codes, scale, zero_point, table, n, k, N, K, SYMMETRIC_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, WORD_COLUMNS: tl.constexpr, ROW_BITS: tl.constexpr, WINDOW: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """float32 [R, C, 4]: rows n [R], int64, by columns k..k + 3 for k [C], multiples of 4. n, k: inside the matrix."""
    superblocks = (K + 63) // 64
    width = (N + 63) // 64 * 64
    inside = n % 64
    h = (inside // 8 % 2).to(tl.int32)[:, None]
    r = (inside // 16 * 8 + inside % 8).to(tl.int32)[:, None]
    t = k % 16 // 4
    k16 = k % 64 // 16
    if WORD_COLUMNS == 16:
        c = (t * 4 + k16)[None, :]
        q = 0
    else:
        c = (t * 2 + k16 // 2)[None, :]
        q = (k16 % 2)[None, :]
    superblock = (n // 64 * superblocks)[:, None] + (k // 64)[None, :]
    words, more = load_words(codes, superblock, r, c, h, LAYOUT, ROW_BITS)
    if GROUP == 0:
        at = n[:, None]
    else:
        at = (k // GROUP * width)[None, :] + n[:, None]
    offset = tl.full((1, 1), 1024 + SYMMETRIC_ZERO, dtype=tl.float16)
    if HAS_ZERO:
        offset = tl.load(zero_point + at).to(tl.float16) + 1024.0
    w0, w1 = value_pair(words, more, offset, table, c, h, q, 0, KIND, LAYOUT, ROW_BITS, WINDOW)
    w2, w3 = value_pair(words, more, offset, table, c, h, q, 1, KIND, LAYOUT, ROW_BITS, WINDOW)
    values = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (n.shape[0], k.shape[0], 4)).to(tl.float32)
    return values * (tl.load(scale + at).to(tl.float32) * UNIT)[:, :, None]


@triton.jit
def dense_kernel(
    codes, scale, zero_point, table, index, y, N, K, COUNT, HAS_INDEX: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, WORD_COLUMNS: tl.constexpr,
    ROW_BITS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [COUNT, K] = rows index int64 [COUNT] of W [N, K], or all rows in order (COUNT = N, not HAS_INDEX)."""
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if HAS_INDEX:
        n = tl.load(index + place, mask=place < COUNT, other=0)
    else:
        n = tl.minimum(place, N - 1).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K // 4) * 4
    values = weights_at(
        codes, scale, zero_point, table, n, tl.minimum(k, (K - 1) // 4 * 4), N, K, SYMMETRIC_ZERO, HAS_ZERO, KIND,
        LAYOUT, WORD_COLUMNS, ROW_BITS, WINDOW, UNIT, GROUP,
    )  # fmt: skip
    values = tl.reshape(values, (BLOCK_R, BLOCK_K)).to(y.dtype.element_ty)
    at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (place < COUNT)[:, None] & (at < K)[None, :]
    tl.store(y + place.to(tl.int64)[:, None] * K + at[None, :], values, mask=inside)
