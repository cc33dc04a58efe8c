"""Device code: split-KV attention over the packed cache, and over the tokens that it keeps in 16 bits.

One program has all query rows of a kv head (query heads of its group times new tokens, padded to BLOCK_M) for a share
of the row's pages, the last program those of sinks, window and fresh tokens. Each leaves its online softmax (Milakov
and Gimelshein, arXiv 1805.02867) in base 2: largest score, sum of weights, sum of weighted values; `kv_combine.py` adds
them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kv_codes import join_planes, key_operand, key_words, split_planes, value_operand, value_words

PAGE = tl.constexpr(64)
_LOG2E = tl.constexpr(1.4426950408889634)
_HEADROOM = tl.constexpr(14.0)
"""Weights are at most 2^14 times a gain's factor below 2, not 1, beside a largest score that is as much smaller: as
float16 they keep all their bits down to 2^-28 of the largest."""

_LEAST_EXPONENT = tl.constexpr(67)
"""Of a gain, biased: 2^-60, below all of float16's but 0."""

_NOT_ZERO = tl.constexpr(1e-30)
"""A product's addend. With a zero one Triton moves the sum over pages into the matrix instruction, which rounds towards
zero: of operands that are all positive that bias grows with the pages."""


@triton.jit
def capped(score, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2, of natural ones where there is a cap."""
    if HAS_SOFTCAP:
        # tanh x = 1 - 2 / (e^2x + 1): right at both infinities, and 1e-7 of the cap otherwise
        score = softcap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * _LOG2E / softcap)) + 1.0)) * _LOG2E
    return score


@triton.jit
def visible(position, token, there, sliding_window):
    """Which of tokens [T] queries at position [M] see, [M, T]."""
    behind = position[:, None] - tl.where(there, token, 1 << 30)[None, :]
    return behind.to(tl.uint32, bitcast=True) < sliding_window.to(tl.uint32)  # a negative one is far above 2^30


@triton.jit
def weights(score, most):
    """(exp2(score - reference) [M, T], decay of what was there [M], reference [M]), which is the larger of `most` and of
    the scores less the headroom. A score of what is not seen is -infinity."""
    larger = tl.maximum(most, tl.max(score, 1) - _HEADROOM)
    floor = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: exp2(-inf - 0) = 0
    return tl.exp2(score - floor[:, None]), tl.exp2(most - floor), larger


@triton.jit
def exponent_and_factor(gain):
    """(e, 2^-e, gain 2^-e) for gains float32 that were float16: the last one from 1 to 2, or 0, or NaN."""
    biased = tl.maximum(tl.minimum((gain.to(tl.int32, bitcast=True) >> 23) & 0xFF, 254), _LEAST_EXPONENT)
    inverse = ((254 - biased) << 23).to(tl.float32, bitcast=True)
    return (biased - 127).to(tl.float32), inverse, gain * inverse


@triton.jit
def add_products(out0, out1, out2, out3, keep, weight, words, more, BITS: tl.constexpr):
    """Outputs of the planes of values times `keep`, plus the weighted values of one page."""
    nothing = tl.full((out0.shape[0], out0.shape[1]), _NOT_ZERO, dtype=tl.float32)
    out0 = out0 * keep + tl.dot(weight, value_operand(words, more, 0, BITS), nothing)
    out1 = out1 * keep + tl.dot(weight, value_operand(words, more, 1, BITS), nothing)
    if BITS != 8:
        out2 = out2 * keep + tl.dot(weight, value_operand(words, more, 2, BITS), nothing)
        out3 = out3 * keep + tl.dot(weight, value_operand(words, more, 3, BITS), nothing)
    return out0, out1, out2, out3


@triton.jit
def attend_pages(
    q, unit, position, k_codes, k_high, k_gain, v_codes, v_gain, table, first, last, kv_heads, head,
    before, stored, low, sliding_window, softcap, D: tl.constexpr, DV: tl.constexpr, BITS_K: tl.constexpr,
    BITS_V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDTH_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(most [M], sum [M], out [M, WIDTH_V]) over pages table[first:last] of one row and kv head.

    q float16 [M, columns], of largest magnitude 1; unit [M]: what its scores are multiplied by. before: positions ahead
    of the pages; stored: tokens in them; low: the first position that any query sees.

    Keys' gains multiply scores. Those of values are split, 2^e f: e is added to the score, so that a weight is that of
    its levels and in float16's range whatever the gains are, f multiplies it, and the denominator has weights 2^-e.
    """
    M: tl.constexpr = q.shape[0]
    t = tl.arange(0, PAGE)
    i_k = tl.arange(0, q.shape[1] // (4 if BITS_K == 8 else 8))[None, :]
    e_v = tl.arange(0, WIDTH_V // (2 if BITS_V == 8 else 4))[None, :]
    offset = tl.sum(q.to(tl.float32), 1) * (3 << BITS_K)
    if BITS_K == 8:
        q0, q1 = tl.split(tl.reshape(q, (M, q.shape[1] // 2, 2)))
    else:
        q0, q1, q2, q3 = split_planes(q)
    most = tl.full((M,), float("-inf"), dtype=tl.float32)
    sum = tl.zeros((M, PAGE), dtype=tl.float32)
    weight_sum = sum
    out0 = tl.zeros((M, WIDTH_V // (2 if BITS_V == 8 else 4)), dtype=tl.float32)
    out1 = out0
    out2 = out0
    out3 = out0
    for index in tl.range(first, last, num_stages=STAGES):
        at = (tl.load(table + index).to(tl.int64) * kv_heads + head) * PAGE + t
        words, more = key_words(k_codes, k_high, at[:, None], i_k, BITS_K, D)
        gain_k = tl.load(k_gain + at).to(tl.float32)
        gain_v = tl.load(v_gain + at).to(tl.float32)
        score = tl.dot(q0, key_operand(words, more, 0, BITS_K))
        score = tl.dot(q1, key_operand(words, more, 1, BITS_K), score)
        if BITS_K != 8:
            score = tl.dot(q2, key_operand(words, more, 2, BITS_K), score)
            score = tl.dot(q3, key_operand(words, more, 3, BITS_K), score)

        token = before + index * PAGE + t
        there = (index * PAGE + t < stored) & (token >= low)
        # what is not there may be NaN, and 0 * NaN is NaN
        exponent, inverse, factor = exponent_and_factor(tl.where(there, gain_v, 0.0))
        score = capped((score - offset[:, None]) * unit[:, None] * gain_k[None, :], softcap, HAS_SOFTCAP)
        seen = visible(position, token, there, sliding_window)
        weight, decay, most = weights(tl.where(seen, score + exponent[None, :], float("-inf")), most)
        keep = decay[:, None]
        sum = sum * keep + weight * inverse[None, :]
        weight = (weight * factor[None, :]).to(tl.float16)
        weight_sum = weight_sum * keep + weight.to(tl.float32)
        words, more = value_words(v_codes, at[:, None], e_v, BITS_V, DV)
        out0, out1, out2, out3 = add_products(out0, out1, out2, out3, keep, weight, words, more, BITS_V)
    if BITS_V == 8:
        out = tl.reshape(tl.join(out0, out1), (M, WIDTH_V))
    else:
        out = join_planes(out0, out1, out2, out3)
    return most, tl.sum(sum, 1), out - (tl.sum(weight_sum, 1) * (3 << BITS_V))[:, None]


@triton.jit
def dot_float32(a, b, sum):
    """sum + a b for a float32, b of 16 or 32 bits: b exact, a to 16 bits or more (11 where b is float16)."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, sum, input_precision="tf32x3")
    high = a.to(b.dtype)
    sum = tl.dot(high, b, sum)
    if b.dtype == tl.bfloat16:
        sum = tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), b, sum)
    return sum


@triton.jit
def attend_dense(
    most, sum, out, q, unit, position, keys, values, first, b, head, k_row, k_token, k_head, v_row, v_token, v_head,
    slots, length, before, low, sliding_window, softcap, D: tl.constexpr, DV: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(most, sum, out [M, columns]) with the `length` tokens of a dense part more, unchanged where it is absent.

    q float32 [M, columns]. Token i stands in slot (first[b] + i) % slots of keys [b, slots, head, D] and values.
    """
    if keys is None:
        return most, sum, out
    start = tl.full((), 0, dtype=tl.int32)
    if first is not None:
        start = tl.load(first + b)
    keys += b.to(tl.int64) * k_row + head * k_head
    values += b.to(tl.int64) * v_row + head * v_head
    t = tl.arange(0, BLOCK_T)
    d_k = tl.arange(0, q.shape[1])[:, None]
    d_v = tl.arange(0, out.shape[1])[None, :]
    for i in tl.range(tl.maximum(low - before, 0) // BLOCK_T * BLOCK_T, length, BLOCK_T):
        token = before + i + t
        there = (i + t < length) & (token >= low)
        slot = ((start + i + t) % slots).to(tl.int64)
        k = tl.load(keys + d_k + slot[None, :] * k_token, mask=there[None, :] & (d_k < D), other=0.0)
        v = tl.load(values + slot[:, None] * v_token + d_v, mask=there[:, None] & (d_v < DV), other=0.0)
        score = dot_float32(q, k, tl.zeros((q.shape[0], BLOCK_T), dtype=tl.float32))
        score = capped(score * unit[:, None], softcap, HAS_SOFTCAP)
        seen = visible(position, token, there, sliding_window)
        weight, decay, most = weights(tl.where(seen, score, float("-inf")), most)
        sum = sum * decay + tl.sum(weight, 1)
        out = dot_float32(weight, v, out * decay[:, None])
    return most, sum, out


@triton.jit
def tokens_of(lengths, row, slots):
    """Tokens of a part that is there, of one row of the batch."""
    if lengths is None:
        return tl.full((), 0, dtype=tl.int32)
    else:
        return tl.minimum(tl.load(lengths + row), slots)


@triton.jit
def attention_kernel(
    q, k_codes, k_high, k_gain, v_codes, v_gain, table, page_lengths, sink_k, sink_v,
    sink_lengths, sink_first, window_k, window_v, window_lengths, window_first, fresh_k, fresh_v, fresh_lengths, fresh_first, start, out, most, sum,
    kv_heads, rows, tokens, table_row, sink_slots, sink_k_row, sink_k_token, sink_k_head, sink_v_row, sink_v_token,
    sink_v_head, window_slots, window_k_row, window_k_token, window_k_head, window_v_row, window_v_token, window_v_head,
    fresh_slots, fresh_k_row, fresh_k_token, fresh_k_head, fresh_v_row, fresh_v_token, fresh_v_head, scale, softcap,
    sliding_window, D: tl.constexpr, DV: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [batch, kv_heads, rows, D], rows = group * tokens, -> out float32 [batch, kv_heads, splits, rows, DV] and most,
    sum float32 [batch, kv_heads, splits, rows].

    Programs: splits (pages by all but the last), kv heads times blocks of rows, batch. table int32 [batch, table_row].
    A part that is absent has None for its tensors, and so has one without `first`. Sums of offsets are 64-bit.
    """
    splits = tl.num_programs(0)
    split = tl.program_id(0)
    head = tl.program_id(1) % kv_heads
    m = tl.program_id(1) // kv_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2)
    sinks = tokens_of(sink_lengths, b, sink_slots)
    stored = tl.minimum(tl.load(page_lengths + b), table_row * PAGE)
    held = tokens_of(window_lengths, b, window_slots)
    fresh = tokens_of(fresh_lengths, b, fresh_slots)
    total = sinks + stored + held + fresh
    begin = 0
    if start is not None:
        begin = tl.load(start + b)
    # a query among the padding has a negative position; a row of no query sees nothing either
    position = tl.where(m < rows, total - tokens + m % tokens, -1)

    d = tl.arange(0, WIDTH_K)
    at = (b.to(tl.int64) * kv_heads + head) * rows + m
    x = tl.load(q + at[:, None] * D + d[None, :], mask=(m < rows)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    # rows of largest magnitude 1: whatever queries there are, float16 holds them (1e-30: the inverse is finite)
    largest = tl.max(tl.abs(x), 1)
    largest = tl.where(largest < 1e-30, 1.0, largest)
    x *= (1.0 / largest)[:, None]
    unit = largest * (scale if HAS_SOFTCAP else scale * _LOG2E)

    low = tl.maximum(begin, tl.maximum(total - tokens, 0) - sliding_window + 1)
    if split < splits - 1:
        low_page = tl.maximum(low - sinks, 0) // PAGE
        pages = tl.maximum((stored + PAGE - 1) // PAGE - low_page, 0)
        m_most, m_sum, m_out = attend_pages(
            x.to(tl.float16), unit, position, k_codes, k_high, k_gain, v_codes, v_gain,
            table + b.to(tl.int64) * table_row, low_page + pages * split // (splits - 1), low_page + pages * (split + 1) // (splits - 1), kv_heads, head,
            sinks, stored, low, sliding_window, softcap, D, DV, BITS_K, BITS_V, HAS_SOFTCAP, WIDTH_V, STAGES,
        )  # fmt: skip
    else:
        m_most = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        m_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        m_out = tl.zeros((BLOCK_M, WIDTH_V), dtype=tl.float32)
        m_most, m_sum, m_out = attend_dense(
            m_most, m_sum, m_out, x, unit, position, sink_k, sink_v, sink_first, b, head, sink_k_row, sink_k_token,
            sink_k_head, sink_v_row, sink_v_token, sink_v_head, sink_slots, sinks, 0, low, sliding_window, softcap, D,
            DV, HAS_SOFTCAP, BLOCK_T,
        )  # fmt: skip
        m_most, m_sum, m_out = attend_dense(
            m_most, m_sum, m_out, x, unit, position, window_k, window_v, window_first, b, head, window_k_row,
            window_k_token, window_k_head, window_v_row, window_v_token, window_v_head, window_slots, held,
            sinks + stored, low, sliding_window, softcap, D, DV, HAS_SOFTCAP, BLOCK_T,
        )  # fmt: skip
        m_most, m_sum, m_out = attend_dense(
            m_most, m_sum, m_out, x, unit, position, fresh_k, fresh_v, fresh_first, b, head, fresh_k_row,
            fresh_k_token, fresh_k_head, fresh_v_row, fresh_v_token, fresh_v_head, fresh_slots, fresh,
            sinks + stored + held, low, sliding_window, softcap, D, DV, HAS_SOFTCAP, BLOCK_T,
        )  # fmt: skip

    at = ((tl.program_id(2).to(tl.int64) * kv_heads + head) * splits + split) * rows + m
    inside = m < rows
    tl.store(most + at, m_most, mask=inside)
    tl.store(sum + at, m_sum, mask=inside)
    d = tl.arange(0, WIDTH_V)
    tl.store(out + at[:, None] * DV + d[None, :], m_out, mask=inside[:, None] & (d < DV)[None, :])
