"""Device code: activations as int8, a scale a token."""

from __future__ import annotations

import triton
import triton.language as tl

_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 below 2^22 plus this, less this, is rounded to the nearest integer, ties to even."""


@triton.jit
def quantize_kernel(x, codes, scale, sum, K, WIDTH, BLOCK: tl.constexpr):
    """One token a program: x [M, K] -> codes int8 [M, WIDTH], scale float32 [M], sum of the codes int32 [M].

    Every four columns are stored in the order 0, 2, 1, 3; columns from K on are 0. A token that holds NaN or infinity
    has scale NaN, which reaches every output; its codes are of no account.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    wrong = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        at = start + column
        value = tl.abs(tl.load(x + token * K + at, mask=at < K, other=0.0).to(tl.float32))
        wrong |= tl.where(value < float("inf"), 0, 1)
        largest = tl.maximum(largest, value)
    top = tl.max(largest, 0)
    bad = tl.max(wrong, 0)
    tl.store(scale + token, tl.where(bad > 0, float("nan"), tl.div_rn(top, 127.0)))
    # what is smaller than 1e-36 is 0: 127 over a subnormal may be infinite
    small = (top < 1e-36) | (bad > 0)
    inverse = tl.where(small, 0.0, tl.div_rn(127.0, tl.where(small, 1.0, top)))
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, WIDTH, BLOCK):
        to = start + column
        place = to % 4
        at = to - place + place // 2 + place % 2 * 2  # 0, 2, 1, 3
        value = tl.load(x + token * K + at, mask=at < K, other=0.0).to(tl.float32)
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
        code = ((value * inverse + _TO_INTEGER) - _TO_INTEGER).to(tl.int32)
        tl.store(codes + token * WIDTH + to, code.to(tl.int8), mask=to < WIDTH)
        total += code
    tl.store(sum + token, tl.sum(total, 0))
