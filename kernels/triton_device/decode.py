"""Device code: what a lane's words say (`kernels/tile_codes.py` draws them), as 16-bit values.

A superblock of 64 x 64 weights is read as a matrix of words with 32 rows and 16 (or 8) columns:

    row     r = 8 n16 + g            stands for the rows 16 n16 + g + 8 h of the weight, h = 0, 1
    column  c = 4 t + k16            stands for the columns 16 k16 + 4 t + j, j = 0..3
            c = 2 t + k16 / 2        where a word holds two tiles, q = k16 % 2 (2 and 3 bits)

so each (h, q, j) is a matrix of its own, [32 n, 16 k], whose product with the columns of x that it stands for is an
ordinary one: no weight changes its thread to be put in order. Codes come in pairs, j = 2 i and 2 i + 1 as the two
halves of a word, since that is how they lie 16 bits apart.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column(c, q, WORD_COLUMNS: tl.constexpr):
    """The first (j = 0) of the four columns of the weight that column `c` of the words stands for."""
    inside = c % WORD_COLUMNS
    if WORD_COLUMNS == 16:
        t = inside // 4
        k16 = inside % 4
    else:
        t = inside // 2
        k16 = inside % 2 * 2 + q
    return c // WORD_COLUMNS * 64 + k16 * 16 + t * 4


@triton.jit
def row(r, h):
    """The row of the weight that row `r` of the words stands for."""
    return r // 8 * 16 + r % 8 + h * 8


@triton.jit
def load_words(codes, superblock, r, c, h, LAYOUT: tl.constexpr, ROW_BITS: tl.constexpr):
    """(words, more) of rows r [R, 1] and columns c [1, C] of the superblocks `superblock` [R, C].

    bits8: the word of row half h. bits3, pairs3: `more` is that of the high plane, moved so that its bit q is tile q's.
    trellis: the 32 bits from the first of the four windows on. Elsewhere h is of no account and `more` is `words`.
    """
    if LAYOUT == "bits4" or LAYOUT == "pairs4":
        words = tl.load(codes + superblock * 512 + r * 16 + c)
        more = words
    elif LAYOUT == "bits8":
        words = tl.load(codes + superblock * 1024 + r * 32 + c * 2 + h)
        more = words
    elif LAYOUT == "bits2" or LAYOUT == "pairs2":
        words = tl.load(codes + superblock * 256 + r * 8 + c)
        more = words
    elif LAYOUT == "bits3" or LAYOUT == "pairs3":
        words = tl.load(codes + superblock * 384 + r * 8 + c)
        more = tl.load(codes + superblock * 384 + 256 + r * 4 + c // 2) >> (c % 2 * 2)
    else:
        tl.static_assert(LAYOUT == "trellis", "LAYOUT is one of tile_codes.Layout, or trellis")
        TILE_WORDS: tl.constexpr = (ROW_BITS + 1) // 2
        tile = codes + superblock * (16 * TILE_WORDS) + (r // 8 * 4 + c % 4) * TILE_WORDS
        start = (r % 8 + 8 * h) * ROW_BITS + c // 4 * ROW_BITS // 4
        word = start // 32
        after = tl.where(word + 1 == TILE_WORDS, 0, word + 1)  # the string goes round in a circle
        low = tl.load(tile + word).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(tile + after).to(tl.uint32, bitcast=True).to(tl.uint64)
        words = (((high << 32) | low) >> (start % 32).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)
        more = words
    return words, more


@triton.jit
def code_pair(words, more, h, q, i, LAYOUT: tl.constexpr):
    """Codes of j = 2 i (low half) and 2 i + 1 (high half) of each word, int32, of layouts bits*."""
    if LAYOUT == "bits4":
        pair = (words >> (4 * (h + 2 * i))) & 0x000F000F
    elif LAYOUT == "bits8":
        pair = (words >> (8 * i)) & 0x00FF00FF
    else:
        pair = (words >> (4 * (h + 2 * i) + 2 * q)) & 0x00030003
        if LAYOUT == "bits3":
            pair |= ((more >> (4 * (h + 2 * i) + q)) & 0x00010001) << 2
    return pair


@triton.jit
def code_byte(words, more, h, q, i, LAYOUT: tl.constexpr):
    """Codes of j = 2 i (low nibble) and 2 i + 1 (high nibble) of each word, int32, of layouts pairs*."""
    if LAYOUT == "pairs4":
        byte = (words >> (8 * (h + 2 * i))) & 0xFF
    else:
        byte = (words >> (8 * (h + 2 * i) + 2 * q)) & 0x33
        if LAYOUT == "pairs3":
            byte |= ((more >> (8 * (h + 2 * i) + q)) & 0x11) << 2
    return byte


@triton.jit
def halves(pair):
    """The low and the high 16 bits of int32 words, as float16."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def half_sums(window, WINDOW: tl.constexpr):
    """uint32: the bytes of a window's product (quant/trellis.py), 0 + 1 in the low half and 2 + 3 in the high one."""
    STATES: tl.constexpr = (1 << WINDOW) - 1
    product = (window & STATES).to(tl.uint32, bitcast=True) * 0x83DCD12D
    return (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)


@triton.jit
def trellis_levels(first, second, WINDOW: tl.constexpr):
    """The levels of two windows' low bits, float16, exact: -510..510. Triton's own language has no dp4a."""
    a = half_sums(first, WINDOW)
    b = half_sums(second, WINDOW)
    # both levels' last additions in one, each in its half: at most 1020, what 1024 | total in float16 can hold
    total = ((a & 0xFFFF) | (b << 16)) + ((a >> 16) | (b & 0xFFFF0000))
    low, high = halves((total | 0x64006400).to(tl.int32, bitcast=True))
    return low - 1534.0, high - 1534.0


@triton.jit
def value_pair(
    words, more, offset, table, c, h, q, i, KIND: tl.constexpr, LAYOUT: tl.constexpr, ROW_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Values before the scale of j = 2 i and 2 i + 1, float16, exact.

    offset: 1024 + zero point, float16, of `int` alone. table: int32 [256], two float16 each (triton_format.pair_table).
    """
    if KIND == "trellis":
        # the windows of a lane's four columns lie in 32 bits: floor((4 t + j) m / 16) - floor(4 t m / 16) is at most 15
        first = c // 4 * ROW_BITS // 4
        even = words >> ((c // 4 * 4 + 2 * i) * ROW_BITS // 16 - first)
        odd = words >> ((c // 4 * 4 + 2 * i + 1) * ROW_BITS // 16 - first)
        low, high = trellis_levels(even, odd, WINDOW)
    elif KIND == "table":
        low, high = halves(tl.load(table + code_byte(words, more, h, q, i, LAYOUT)))
    else:
        pair = code_pair(words, more, h, q, i, LAYOUT)
        if KIND == "int":
            low, high = halves(pair | 0x64006400)  # 1024 + code, exact in float16
            low -= offset
            high -= offset
        else:
            tl.static_assert(KIND == "e4m3", "KIND is int, table, e4m3 or trellis")
            # exponent and mantissa moved to those of float16, whose bias is 8 larger; subnormals come out right
            low, high = halves(((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << 7))
            low *= 256.0
            high *= 256.0
    return low, high
