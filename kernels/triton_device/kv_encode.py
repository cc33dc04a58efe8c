"""Device code: rotation of the KV cache's vectors and their encoding into pages, as quant/kv_token.py has them.

Operations and their order are those of `kv_token.rotate` and `encode`, and nothing is contracted to a fused
multiply-add (the launchers say so): codes are the same bits, whatever the number of vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kv_codes import split_planes

PAGE = tl.constexpr(64)


@triton.jit
def load_vectors(x, mean, vector, VECTORS, heads, token_stride, head_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [R, WIDTH] of vectors [R] (token * heads + head) of x [tokens, heads, D], less mean [heads, D]; zero
    beyond D."""
    d = tl.arange(0, WIDTH)[None, :]
    inside = (vector < VECTORS)[:, None] & (d < D)
    head = (vector % heads)[:, None]
    at = (vector // heads).to(tl.int64)[:, None] * token_stride + head * head_stride + d
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        z -= tl.load(mean + head * D + d, mask=inside, other=0.0)
    return z


@triton.jit
def rotated(z, matrix, factor, ODD: tl.constexpr, LOG2: tl.constexpr):
    """R z for z float32 [R, WIDTH], D = ODD 2^LOG2 numbers and zeros. factor: 2^(-LOG2 / 2).

    matrix: DHT_ODD float32 [ODD, ODD], None where ODD is 1.
    """
    ROWS: tl.constexpr = z.shape[0]
    WIDTH: tl.constexpr = z.shape[1]
    POWER: tl.constexpr = 1 << LOG2
    upper = tl.arange(0, 2)[None, :, None] == 1
    for stage in tl.static_range(LOG2):
        pairs = tl.reshape(z, (ROWS * WIDTH // (2 << stage), 2, 1 << stage))
        plus = tl.sum(pairs, 1)
        minus = tl.sum(tl.where(upper, -pairs, pairs), 1)
        z = tl.where(upper, minus[:, None, :], plus[:, None, :])
    z = tl.reshape(z, (ROWS, WIDTH)) * factor
    if ODD > 1:
        HEIGHT: tl.constexpr = WIDTH // POWER
        z = tl.reshape(z, (ROWS, HEIGHT, POWER))
        p = tl.arange(0, HEIGHT)
        out = z
        for j in tl.static_range(ODD):
            line = tl.sum(tl.where((p == j)[None, :, None], z, 0.0), 1)
            column = tl.load(matrix + p * ODD + j, mask=p < ODD, other=0.0)
            term = column[None, :, None] * line[:, None, :]
            out = term if j == 0 else out + term
        z = tl.reshape(out, (ROWS, WIDTH))
    return z


@triton.jit
def rotate_kernel(
    x, mean, matrix, y, VECTORS, heads, token_stride, head_stride, factor, D: tl.constexpr, WIDTH: tl.constexpr,
    ODD: tl.constexpr, LOG2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [VECTORS, D] = R (x - mean) for x [tokens, heads, D]; BLOCK vectors a program."""
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = load_vectors(x, mean, vector, VECTORS, heads, token_stride, head_stride, D, WIDTH)
    z = rotated(z, matrix, factor, ODD, LOG2)
    d = tl.arange(0, WIDTH)[None, :]
    to = vector.to(tl.int64)[:, None] * D + d
    tl.store(y + to, z.to(y.dtype.element_ty), mask=(vector < VECTORS)[:, None] & (d < D))


@triton.jit
def store_words(codes, code, row, stored, BITS: tl.constexpr, D: tl.constexpr):
    """Rows `row` int64 [R] of codes, packed (`kv_codes.load_words` reads them): code int32 [R, 4 E], where `stored`."""
    WORDS: tl.constexpr = D // 4
    c0, c1, c2, c3 = split_planes(code)
    e = tl.arange(0, c0.shape[1])[None, :]
    inside = stored[:, None] & (e < WORDS)
    if BITS == 3:
        ROW: tl.constexpr = 3 * D // 8
        low = (c0 & 3) | (c1 & 3) << 2 | (c2 & 3) << 4 | (c3 & 3) << 6
        tl.store(codes + row[:, None] * ROW + e, low.to(tl.uint8), mask=inside)
        high = c0 >> 2 | c1 >> 2 << 1 | c2 >> 2 << 2 | c3 >> 2 << 3
        even, odd = tl.split(tl.reshape(high, (high.shape[0], high.shape[1] // 2, 2)))
        e = tl.arange(0, even.shape[1])[None, :]
        inside = stored[:, None] & (e < WORDS // 2)
        tl.store(codes + row[:, None] * ROW + WORDS + e, (even | odd << 4).to(tl.uint8), mask=inside)
    else:
        word = c0 | c1 << BITS | c2 << 2 * BITS | c3 << 3 * BITS
        tl.store(codes + row[:, None] * WORDS + e, word.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def append_kernel(
    x, mean, matrix, slots, codes, gain, VECTORS, SLOTS, heads, token_stride, head_stride, factor, step, most_gain,
    D: tl.constexpr, WIDTH: tl.constexpr, ODD: tl.constexpr, LOG2: tl.constexpr, BITS: tl.constexpr,
    UNBIASED: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [tokens, heads, D] encoded into slots int64 [tokens] of codes and gain float16 [pages, heads, 64].

    A slot that is not among the SLOTS of the pages, such as -1, is nothing to do. step: quant/kv_token.STEP.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = load_vectors(x, mean, vector, VECTORS, heads, token_stride, head_stride, D, WIDTH)
    if ROTATE:
        z = rotated(z, matrix, factor, ODD, LOG2)
    within = tl.arange(0, WIDTH)[None, :] < D
    wide = z.to(tl.float64)
    energy = tl.sum(wide * wide, 1)
    scale = tl.sqrt(energy / D).to(tl.float32) * step
    usable = (scale > 0.0) & (scale < float("inf"))
    position = tl.floor(tl.div_rn(z, tl.where(usable, scale, 1.0)[:, None]) + HALF)
    position = tl.where(usable[:, None], position, HALF)
    code = tl.minimum(tl.maximum(position, 0.0), 2.0 * HALF - 1.0).to(tl.int32)
    level = tl.where(within, code * 2 - (2 * HALF - 1), 0).to(tl.float64)
    along = tl.sum(wide * level, 1)
    if UNBIASED:
        value = energy / along
    else:
        value = along / tl.sum(level * level, 1)
    value = tl.where(usable, tl.minimum(value, most_gain), tl.where(scale == 0.0, 0.0, float("nan")))

    slot = tl.load(slots + vector // heads, mask=vector < VECTORS, other=-1)
    stored = (slot >= 0) & (slot < SLOTS)
    row = (slot // PAGE * heads + vector % heads) * PAGE + slot % PAGE
    tl.store(gain + row, value.to(tl.float32).to(tl.float16), mask=stored)
    store_words(codes, code, row, stored, BITS, D)
