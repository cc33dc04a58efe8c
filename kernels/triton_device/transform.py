"""Device code: the transforms of a layer's input (quant/rotate.py, quant/order.py, quant/scale.py).

The Hartley-Hadamard transform of n = a b columns is x -> A X B with X = x read as [a, b] (quant/hartley.py): two passes
of small products, B along the rows of X and then A along its columns. Products are tf32x3, close to float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_kernel(x, factors, order, y, n, HAS_ORDER: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, n] = x [M, n] in the `order` int32 [n] (column j is column order[j] of x), times factors float32 [n]."""
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = j
    if HAS_ORDER:
        at = tl.load(order + j, mask=j < n, other=0)
    value = tl.load(x + token * n + at, mask=j < n, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        value *= tl.load(factors + j, mask=j < n, other=0.0)
    tl.store(y + token * n + j, value.to(y.dtype.element_ty), mask=j < n)


@triton.jit
def rotate_rows_kernel(
    x, factors, matrix, y, LINES, a, b, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr, LINE_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y float32 [LINES, b] = (x * factors) B for x [LINES, b], factors float32 [a, b] (line l has those of l % a)."""
    line = tl.program_id(0) * LINE_BLOCK + tl.arange(0, LINE_BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.zeros((LINE_BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, b, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        inside = (line < LINES)[:, None] & (i < b)[None, :]
        value = tl.load(x + line.to(tl.int64)[:, None] * b + i[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            value *= tl.load(factors + (line % a)[:, None] * b + i[None, :], mask=inside, other=0.0)
        part = tl.load(matrix + i[:, None] * b + j[None, :], mask=(i < b)[:, None] & (j < b)[None, :], other=0.0)
        sum = tl.dot(value, part, sum, input_precision="tf32x3")
    inside = (line < LINES)[:, None] & (j < b)[None, :]
    tl.store(y + line.to(tl.int64)[:, None] * b + j[None, :], sum.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_columns_kernel(
    x, matrix, y, a, b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y [M, a, b] = A x for each token of x float32 [M, a, b]."""
    token = tl.program_id(0).to(tl.int64) * a * b
    i = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    sum = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    for start in range(0, a, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < a)[:, None] & (j < b)[None, :]
        value = tl.load(x + token + k[:, None] * b + j[None, :], mask=inside, other=0.0)
        part = tl.load(matrix + i[:, None] * a + k[None, :], mask=(i < a)[:, None] & (k < a)[None, :], other=0.0)
        sum = tl.dot(part, value, sum, input_precision="tf32x3")
    inside = (i < a)[:, None] & (j < b)[None, :]
    tl.store(y + token + i[:, None] * b + j[None, :], sum.to(y.dtype.element_ty), mask=inside)
