"""Device code: y = x W^T with int8 activations and 4-bit weights as int8, exact int32 sums.

Activations are stored as `activations.py` writes them: every four columns in the order 0, 2, 1, 3, which is that of the
bytes of a word's codes. A word's four codes of one row become four int8 at once, by arithmetic on the whole word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import column, row


@triton.jit
def quads_of_x(x, m, k, M, WIDTH):
    """int8 x [M, WIDTH] at tokens m [B] and columns k..k + 3 for k [C], as stored: [4 C, B], zero outside."""
    at = tl.reshape(k[:, None] + tl.arange(0, 4)[None, :], (4 * k.shape[0],))
    inside = (m < M)[None, :] & (at < WIDTH)[:, None]
    return tl.load(x + m.to(tl.int64)[None, :] * WIDTH + at[:, None], mask=inside, other=0)


@triton.jit
def bytes_of(quad):
    """int32 [R, C] -> int8 [R, 4 C], the lowest byte first."""
    b0 = quad.to(tl.int8)
    b1 = (quad >> 8).to(tl.int8)
    b2 = (quad >> 16).to(tl.int8)
    b3 = (quad >> 24).to(tl.int8)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (quad.shape[0], 4 * quad.shape[1]))


@triton.jit
def store_scaled(
    y, total, n, m, M, N, x_scale, x_sum, zero_point, scale, bias, s, SYMMETRIC_ZERO: tl.constexpr,
    PER_GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Rows n of y from exact sums: (total - zero point * sum of x) * scale of the row * scale of the token + bias."""
    if not PER_GROUP:
        sums = tl.load(x_sum + m, mask=m < M, other=0)[None, :]
        if HAS_ZERO:
            total -= tl.load(zero_point + s).to(tl.int32)[:, None] * sums
        else:
            total -= SYMMETRIC_ZERO * sums
    by_row = tl.load(scale + s).to(tl.float32)
    by_token = tl.load(x_scale + m, mask=m < M, other=0.0)
    value = total.to(tl.float32) * by_row[:, None] * by_token[None, :]
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear_int8_kernel(
    x, x_scale, x_sum, codes, scale, zero_point, group_scale, group_offset, bias, y, parts, M, N, K,
    SYMMETRIC_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, PER_GROUP: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x int8 [M, KP], x_scale float32 [M], x_sum int32 [M], codes bits4, y [M, N]; KP: K rounded up to 64.

    PER_GROUP: a weight is code * group_scale + group_offset - 128 (both uint8 [groups, NP], GROUP columns each), in
    -128..127, times scale; else it is (code - zero point) * scale. PARTS > 1: int32 sums go to `parts` [PARTS, M, N].
    """
    ROWS: tl.constexpr = BLOCK_N // 2
    COLUMNS: tl.constexpr = BLOCK_K // 4
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    superblocks = (K + 63) // 64
    width = (N + 63) // 64 * 64
    steps = (superblocks * 64 + BLOCK_K - 1) // BLOCK_K
    first = steps * part // PARTS
    last = steps * (part + 1) // PARTS

    n_block = tl.program_id(0) * (BLOCK_N // 64) + r // 32
    n_inside = tl.minimum(n_block, width // 64 - 1)  # see linear.py
    n0 = n_block * 64 + row(r % 32, 0)
    n1 = n_block * 64 + row(r % 32, 1)
    s0 = tl.minimum(n0, width - 1)
    s1 = tl.minimum(n1, width - 1)

    sum0 = tl.zeros((ROWS, BLOCK_M), dtype=tl.int32)
    sum1 = tl.zeros((ROWS, BLOCK_M), dtype=tl.int32)
    for step in tl.range(first, last, num_stages=STAGES):
        k_block = tl.minimum(step * (BLOCK_K // 64) + c // 16, superblocks - 1)
        superblock = n_inside[:, None] * superblocks + k_block[None, :]
        words = tl.load(codes + superblock * 512 + (r % 32)[:, None] * 16 + (c % 16)[None, :])
        at = column(c, 0, 16)
        quad0 = words & 0x0F0F0F0F
        quad1 = (words >> 4) & 0x0F0F0F0F
        if PER_GROUP:
            # bytes do not carry: code * group_scale + group_offset is at most 255, checked when weights are packed
            group = (tl.minimum(step * BLOCK_K + at, superblocks * 64 - 1) // GROUP)[None, :] * width
            times0 = tl.load(group_scale + group + s0[:, None]).to(tl.int32)
            times1 = tl.load(group_scale + group + s1[:, None]).to(tl.int32)
            plus0 = tl.load(group_offset + group + s0[:, None]).to(tl.int32)
            plus1 = tl.load(group_offset + group + s1[:, None]).to(tl.int32)
            quad0 = (quad0 * times0 + plus0 * 0x01010101) ^ -0x7F7F7F80  # 0x80808080: less 128 in each byte
            quad1 = (quad1 * times1 + plus1 * 0x01010101) ^ -0x7F7F7F80
        x8 = quads_of_x(x, m, step * BLOCK_K + at, M, superblocks * 64)
        sum0 = tl.dot(bytes_of(quad0), x8, sum0, out_dtype=tl.int32)
        sum1 = tl.dot(bytes_of(quad1), x8, sum1, out_dtype=tl.int32)

    if PARTS > 1:
        plane = parts + part.to(tl.int64) * M * N
        rows0 = m.to(tl.int64)[None, :] * N + n0[:, None]
        rows1 = m.to(tl.int64)[None, :] * N + n1[:, None]
        tl.store(plane + rows0, sum0, mask=(n0 < N)[:, None] & (m < M)[None, :])
        tl.store(plane + rows1, sum1, mask=(n1 < N)[:, None] & (m < M)[None, :])
    else:
        store_scaled(
            y, sum0, n0, m, M, N, x_scale, x_sum, zero_point, scale, bias, s0, SYMMETRIC_ZERO, PER_GROUP, HAS_ZERO,
            HAS_BIAS,
        )  # fmt: skip
        store_scaled(
            y, sum1, n1, m, M, N, x_scale, x_sum, zero_point, scale, bias, s1, SYMMETRIC_ZERO, PER_GROUP, HAS_ZERO,
            HAS_BIAS,
        )  # fmt: skip


@triton.jit
def sum_int8_parts_kernel(
    parts, x_scale, x_sum, scale, zero_point, bias, y, M, N, SYMMETRIC_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y [M, N] from the int32 sums of `linear_int8_kernel`'s parts [PARTS, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    total = tl.load(parts + at, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + tl.full((), part, tl.int64) * M * N + at, mask=inside, other=0)
    store_scaled(
        y, total, n, m, M, N, x_scale, x_sum, zero_point, scale, bias, tl.minimum(n, N - 1), SYMMETRIC_ZERO, PER_GROUP,
        HAS_ZERO, HAS_BIAS,
    )  # fmt: skip
