"""Device code: rows of codes of the KV cache (quant/kv_token.py) as 16-bit values, two to a word.

A row of D codes is cut into P planes, plane j with the channels P e + j, e = 0 .. D / P - 1: a product over channels is
P products over planes, and no code changes its thread to be put in order. P is 4, of 8 bits 2.

A register of a matrix instruction has two values that are neighbours in the dimension which is summed: two channels e
of keys, two tokens of values. So codes are brought 16 bits apart in a word of 32 and become two values at once,

    (w >> b j) & (2^b - 1) * 0x00010001      of plane j

where w are 16 bits (b = 4, 8) or 8 bits (b = 2 and, with its low bits, 3) of the one and of the other.

A value is the level 2 c - (2^b - 1), an odd whole number, plus 3 * 2^b: from 2^(b+1) to 2^(b+2), where the bits of
float16 are a fixed exponent and, below it, those of 2 c + 1. So a pair of codes becomes a pair of operands by a shift
and two logical instructions, where a subtraction and the moves that ptxas puts around it would be three more. Products
take back 3 * 2^b times the sum of the other operand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_words(codes, high, row, i, BITS: tl.constexpr, D: tl.constexpr):
    """(words, more) int32 of rows `row` [T, 1]: pairs of channels e = 2 i and 2 i + 1 for i [1, E / 2]; zero beyond D.

    codes: int32 of 4 and 8 bits, int16 of 2 and 3; of 3 bits, uint8 where a row has an odd number of bytes. high: the
    same codes as uint8, of 3 bits alone. more: the third bits, for `level_pairs`.
    """
    WORDS: tl.constexpr = D // 4 if BITS == 8 else D // 8
    inside = i < WORDS
    if BITS == 4 or BITS == 8:
        words = tl.load(codes + row * WORDS + i, mask=inside, other=0)
        more = words
    else:
        if codes.dtype.element_ty == tl.int16:
            ROW: tl.constexpr = WORDS if BITS == 2 else 3 * WORDS // 2
            words = tl.load(codes + row * ROW + i, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.int32)
            words = (words | (words << 8)) & 0x00FF00FF
        else:
            at = codes + row * (3 * WORDS) + i * 2
            words = tl.load(at, mask=inside, other=0).to(tl.int32)
            words |= tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 16
        more = words
        if BITS == 3:
            more = tl.load(high + row * (3 * WORDS) + 2 * WORDS + i, mask=inside, other=0).to(tl.int32)
            more |= more << 12
    return words, more


@triton.jit
def value_words(codes, row, e, BITS: tl.constexpr, D: tl.constexpr):
    """(words, more) int32 [T / 2, E] of rows `row` [T, 1]: pairs of tokens 2 i and 2 i + 1, at e [1, E]; zero beyond D.

    codes: int16 of 4 and 8 bits, uint8 of 2 and 3. more: the third bits.
    """
    WORDS: tl.constexpr = D // 2 if BITS == 8 else D // 4
    inside = e < WORDS
    if BITS == 3:
        words = paired(tl.load(codes + row * (3 * WORDS // 2) + e, mask=inside, other=0))
        more = tl.load(codes + row * (3 * WORDS // 2) + WORDS + e // 2, mask=inside, other=0)
        more = paired(more >> (e % 2 * 4).to(tl.uint8))
    else:
        words = paired(tl.load(codes + row * WORDS + e, mask=inside, other=0))
        more = words
    return words, more


@triton.jit
def paired(x):
    """x [2 S, N] of 8 or 16 bits -> int32 [S, N]: x[2 s] in the low half, x[2 s + 1] in the high one."""
    if x.dtype == tl.int16:
        x = x.to(tl.uint16, bitcast=True)
    even, odd = tl.split(tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1)))
    return even.to(tl.int32) | (odd.to(tl.int32) << 16)


@triton.jit
def level_pairs(words, more, j: tl.constexpr, BITS: tl.constexpr):
    """Levels of plane j plus 3 * 2^b, of the low and the high half of each word: float16's bits, exact."""
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    LOWEST: tl.constexpr = 10 - BITS
    FRAME: tl.constexpr = (
        (BITS + 16) << 10 | 1 << 9 - BITS
    ) * 0x00010001  # of each: its exponent, and the 1 of 2 c + 1
    pair = (moved(words, LOWEST - FIELD * j) & (((1 << FIELD) - 1 << LOWEST) * 0x00010001)) | FRAME
    if BITS == 3:
        pair |= moved(more, 9 - j) & 0x02000200
    return (pair & 0xFFFF).to(tl.uint16), ((pair >> 16) & 0xFFFF).to(tl.uint16)


@triton.jit
def moved(words, LEFT: tl.constexpr):
    if LEFT >= 0:
        return words << LEFT
    else:
        return words >> -LEFT


@triton.jit
def key_operand(words, more, j: tl.constexpr, BITS: tl.constexpr):
    """Plane j of keys: float16 [E, T] of words [T, E / 2]."""
    low, high = level_pairs(words, more, j, BITS)
    both = tl.join(low, high)
    return tl.trans(tl.reshape(both, (both.shape[0], both.shape[1] * 2))).to(tl.float16, bitcast=True)


@triton.jit
def value_operand(words, more, j: tl.constexpr, BITS: tl.constexpr):
    """Plane j of values: float16 [T, E] of words [T / 2, E]."""
    low, high = level_pairs(words, more, j, BITS)
    both = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(both, (both.shape[0] * 2, both.shape[2])).to(tl.float16, bitcast=True)


@triton.jit
def split_planes(x):
    """x [R, 4 E] -> its four planes [R, E]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_planes(x0, x1, x2, x3):
    """The inverse: four planes [R, E] -> [R, 4 E]."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], x0.shape[1] * 4))
