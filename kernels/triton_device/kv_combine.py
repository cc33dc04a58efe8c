"""Device code: the splits of `kv_attention.py` added up, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine_kernel(
    parts, most, sum, sink_logits, y, kv_heads, rows, tokens, splits, DV: tl.constexpr, BLOCK: tl.constexpr
):
    """y [batch, kv_heads, rows, DV] from parts float32 [batch, kv_heads, splits, rows, DV] and most, sum float32
    [batch, kv_heads, splits, rows]; a row that has seen nothing is zero. Programs: rows, batch * kv_heads.

    sink_logits [kv_heads * rows / tokens]: a term more of each denominator; None: none.
    """
    row = tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    at = outer * splits * rows + row
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    if sink_logits is not None:
        head = tl.program_id(1) % kv_heads * (rows // tokens) + row // tokens
        logit = tl.load(sink_logits + head).to(tl.float32) * _LOG2E
        largest = tl.maximum(largest, logit)
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(most + at + split * rows))
    floor = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((), dtype=tl.float32)
    out = tl.zeros((BLOCK,), dtype=tl.float32)
    if sink_logits is not None:
        total += tl.exp2(logit - floor)
    for split in range(splits):
        factor = tl.exp2(tl.load(most + at + split * rows) - floor)
        # without a weight it may yet hold a NaN, and 0 * NaN is NaN
        total += tl.load(sum + at + split * rows) * factor
        out += tl.load(parts + (at + split * rows) * DV + d, mask=d < DV, other=0.0) * factor
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(y + (outer * rows + row) * DV + d, out.to(y.dtype.element_ty), mask=d < DV)
