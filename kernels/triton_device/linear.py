"""Device code: y = x W^T from packed tiles, 16-bit activations, float32 sums.

W is the first operand of each product and x^T the second: rows of W fill the 16 rows (64 on Hopper) of a matrix
instruction whatever the number of tokens. Every (h, q, j) of `decode.py` is a product of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import column, load_words, row, value_pair


@triton.jit
def columns_of_x(x, m, k, K, M):
    """x [M, K] at tokens m [B] and columns k..k + 3 for k [C]: four matrices [C, B], zero outside."""
    j = tl.arange(0, 4)
    at = k[None, :, None] + j[None, None, :]
    inside = (m[:, None, None] < M) & (at < K)
    values = tl.load(x + m.to(tl.int64)[:, None, None] * K + at, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(values, (m.shape[0], k.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return tl.trans(x0), tl.trans(x1), tl.trans(x2), tl.trans(x3)


@triton.jit
def scaled(value, scale, IN_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    """A value as an operand; with its scale where that differs within a step's columns, rounded once."""
    if IN_WEIGHT:
        if value.dtype == DTYPE:
            return value * scale
        return (value.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
    return value.to(DTYPE)


@triton.jit
def offset_of(zero_point, at, HAS_ZERO: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr):
    """1024 + zero point, float16: what `value_pair` takes from a code."""
    if HAS_ZERO:
        return tl.load(zero_point + at).to(tl.float16) + 1024.0
    else:
        return tl.full((1, 1), 1024 + SYMMETRIC_ZERO, dtype=tl.float16)


@triton.jit
def half_rows(
    sum, words, more, x0, x1, x2, x3, offset, scale, table, c, h: tl.constexpr, q: tl.constexpr, KIND: tl.constexpr,
    LAYOUT: tl.constexpr, ROW_BITS: tl.constexpr, WINDOW: tl.constexpr, IN_WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """sum += W x^T over one tile's worth of columns, of the rows of half h."""
    w0, w1 = value_pair(words, more, offset, table, c, h, q, 0, KIND, LAYOUT, ROW_BITS, WINDOW)
    w2, w3 = value_pair(words, more, offset, table, c, h, q, 1, KIND, LAYOUT, ROW_BITS, WINDOW)
    sum = tl.dot(scaled(w0, scale, IN_WEIGHT, DTYPE), x0, sum)
    sum = tl.dot(scaled(w1, scale, IN_WEIGHT, DTYPE), x1, sum)
    sum = tl.dot(scaled(w2, scale, IN_WEIGHT, DTYPE), x2, sum)
    return tl.dot(scaled(w3, scale, IN_WEIGHT, DTYPE), x3, sum)


@triton.jit
def store_rows(y, sum, n, m, M, N, bias, part, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Rows n of the product: y [M, N], or its part's plane of y [PARTS, M, N]."""
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if PARTS > 1:
        at += part.to(tl.int64) * M * N
    elif HAS_BIAS:
        sum += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at, sum.to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x, codes, scale, zero_point, table, bias, y, M, N, K, SYMMETRIC_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, WORD_COLUMNS: tl.constexpr,
    ROW_BITS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, SCALE_AT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [M, K], y [M, N] in the dtype of x, or float32 [PARTS, M, N] with a part of the columns each (PARTS > 1).

    Programs: rows of W in blocks of BLOCK_N, tokens in blocks of BLOCK_M, parts. BLOCK_K: columns of a step, whole
    superblocks. SCALE_AT: "end" (one group), "step" (a step lies in one group: sums are scaled, values stay exact) or
    "weight" (each weight is scaled and rounded to the dtype of x). UNIT multiplies the scale. GROUP: columns, 0: all.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = BLOCK_N // 2
    COLUMNS: tl.constexpr = BLOCK_K // 64 * WORD_COLUMNS
    IN_WEIGHT: tl.constexpr = SCALE_AT == "weight"
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    superblocks = (K + 63) // 64
    width = (N + 63) // 64 * 64  # of a group's scales
    steps = (superblocks * 64 + BLOCK_K - 1) // BLOCK_K
    first = steps * part // PARTS
    last = steps * (part + 1) // PARTS

    n_block = tl.program_id(0) * (BLOCK_N // 64) + r // 32
    # a block may reach beyond the last rows of superblocks and a step beyond the last columns: they read others again,
    # and what comes of it is not stored or meets zeros of x
    n_inside = tl.minimum(n_block, width // 64 - 1)
    n0 = n_block * 64 + row(r % 32, 0)
    n1 = n_block * 64 + row(r % 32, 1)
    s0 = tl.minimum(n0, width - 1)
    s1 = tl.minimum(n1, width - 1)

    sum0 = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    sum1 = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    one = tl.full((1, 1), 1, dtype=tl.float16)
    row_offset0 = offset_of(zero_point, s0[:, None], HAS_ZERO and GROUP == 0, SYMMETRIC_ZERO)
    row_offset1 = offset_of(zero_point, s1[:, None], HAS_ZERO and GROUP == 0, SYMMETRIC_ZERO)

    for step in tl.range(first, last, num_stages=STAGES):
        k_block = tl.minimum(step * (BLOCK_K // 64) + c // WORD_COLUMNS, superblocks - 1)
        superblock = n_inside[:, None] * superblocks + k_block[None, :]
        inside = (c % WORD_COLUMNS)[None, :]
        words0, more0 = load_words(codes, superblock, (r % 32)[:, None], inside, 0, LAYOUT, ROW_BITS)
        if LAYOUT == "bits8" or LAYOUT == "trellis":
            words1, more1 = load_words(codes, superblock, (r % 32)[:, None], inside, 1, LAYOUT, ROW_BITS)
        else:
            words1, more1 = words0, more0
        offset0 = row_offset0
        offset1 = row_offset1
        weight_scale0 = one
        weight_scale1 = one
        if SCALE_AT == "step":
            group = step * BLOCK_K // GROUP * width
            offset0 = offset_of(zero_point, group + s0[:, None], HAS_ZERO, SYMMETRIC_ZERO)
            offset1 = offset_of(zero_point, group + s1[:, None], HAS_ZERO, SYMMETRIC_ZERO)
            total0 = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
            total1 = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
        else:
            total0 = sum0
            total1 = sum1
        for q in tl.static_range(16 // WORD_COLUMNS):
            at = column(c, q, WORD_COLUMNS)
            if IN_WEIGHT:
                # the same group for all four columns: groups are of 32 or more
                group = (tl.minimum(step * BLOCK_K + at, superblocks * 64 - 1) // GROUP)[None, :] * width
                weight_scale0 = tl.load(scale + group + s0[:, None])
                weight_scale1 = tl.load(scale + group + s1[:, None])
                offset0 = offset_of(zero_point, group + s0[:, None], HAS_ZERO, SYMMETRIC_ZERO)
                offset1 = offset_of(zero_point, group + s1[:, None], HAS_ZERO, SYMMETRIC_ZERO)
            x0, x1, x2, x3 = columns_of_x(x, m, step * BLOCK_K + at, K, M)
            total0 = half_rows(
                total0, words0, more0, x0, x1, x2, x3, offset0, weight_scale0, table, inside, 0, q, KIND, LAYOUT,
                ROW_BITS, WINDOW, IN_WEIGHT, DTYPE,
            )  # fmt: skip
            total1 = half_rows(
                total1, words1, more1, x0, x1, x2, x3, offset1, weight_scale1, table, inside, 1, q, KIND, LAYOUT,
                ROW_BITS, WINDOW, IN_WEIGHT, DTYPE,
            )  # fmt: skip
        if SCALE_AT == "step":
            at = scale + step * BLOCK_K // GROUP * width
            sum0 += total0 * tl.load(at + s0).to(tl.float32)[:, None]
            sum1 += total1 * tl.load(at + s1).to(tl.float32)[:, None]
        else:
            sum0 = total0
            sum1 = total1

    if SCALE_AT == "end":
        sum0 *= tl.load(scale + s0).to(tl.float32)[:, None] * UNIT
        sum1 *= tl.load(scale + s1).to(tl.float32)[:, None] * UNIT
    store_rows(y, sum0, n0, m, M, N, bias, part, PARTS, HAS_BIAS)
    store_rows(y, sum1, n1, m, M, N, bias, part, PARTS, HAS_BIAS)


@triton.jit
def sum_parts_kernel(parts, bias, y, SIZE, N, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y [SIZE] = the sum over PARTS planes of parts float32 [PARTS, SIZE], in their order, and bias [N] along rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + tl.full((), SIZE, tl.int64) * part + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
