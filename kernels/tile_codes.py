"""Codes in the order of the GPU kernels' registers: 64 x 64 superblocks of 16 x 16 tiles, a lane's words together.

A weight [out, in] is padded to multiples of 64. Superblocks follow each other along a row of superblocks; each is 4 x 4
tiles (n16 down the rows, k16 along the columns). Lane 4 g + t of a warp (g = 0..7, t = 0..3) owns eight weights of each
tile, rows g and g + 8 by columns c0..c3 = 4 t..4 t + 3, which is what a lane holds of the A operand of an m16n8k16
product (PTX ISA, "Matrix Fragments for mma.m16n8k16") whose k slots 2t, 2t+1, 2t+8, 2t+9 stand for those columns.

    bits4   word[n16][lane][k16], a nibble a code:
            bit  0        4          8        12         16       20         24       28
                 (g, c0)  (g+8, c0)  (g, c2)  (g+8, c2)  (g, c1)  (g+8, c1)  (g, c3)  (g+8, c3)
    bits2   word[n16][lane][2]: the nibbles of tile k16 are (word[k16 / 2] >> 2 (k16 % 2)) & 0x33333333
    bits3   the bits2 layout of code & 3 (256 words), then word[n16][lane]: bit 4 s + k16 = code >> 2 of nibble slot s
    pairs2, pairs3   as bits2 and bits3 with the nibbles in pairs of columns, so that four are a selector of bytes:
            (g, c0)  (g, c1)  (g+8, c0)  (g+8, c1)  (g, c2)  (g, c3)  (g+8, c2)  (g+8, c3)
    bits8   word[n16][lane][k16][2]: word 0 row g, word 1 row g + 8, bytes c0, c2, c1, c3
    pairs4  word[n16][lane][k16], a byte a pair of columns (low nibble the first), an index into a table of 256 pairs:
            byte 0 (g; c0, c1)   byte 1 (g+8; c0, c1)   byte 2 (g; c2, c3)   byte 3 (g+8; c2, c3)
    trellis word[n16][k16][W], W = ceil(row_bits / 2): a tile's 2 row_bits bytes as they are, the first two once more
            where row_bits is odd (the string is cyclic)

Words are little-endian uint32, stored as int32: torch shifts no uint32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SUPERBLOCK, TILE = 64, 16
TILES = SUPERBLOCK // TILE

Layout = Literal["bits2", "bits3", "bits4", "bits8", "pairs2", "pairs3", "pairs4"]

WORDS: dict[Layout, int] = {
    "bits2": 256,
    "bits3": 384,
    "bits4": 512,
    "bits8": 1024,
    "pairs2": 256,
    "pairs3": 384,
    "pairs4": 512,
}
"""uint32 words of a superblock."""

_IN_PAIRS = ("pairs2", "pairs3", "pairs4")


def padded(n: int) -> int:
    """n rounded up to whole superblocks."""
    return -(-n // SUPERBLOCK) * SUPERBLOCK


def pack_codes(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [64 a, 64 b], values that fit the layout -> int32 [a, b, WORDS[layout]]."""
    blocks = codes.shape[0] // SUPERBLOCK, codes.shape[1] // SUPERBLOCK
    # [a, n16, row half, g, b * k16 * t]: a word is four columns, byte j = column c_j
    quads = codes.contiguous().view(torch.int32).view(blocks[0], TILES, 2, 8, -1)
    if layout == "bits8":
        return _lane_major(_even_odd(quads).movedim(2, -1), blocks).view(*blocks, -1)
    nibbles = _pairs if layout in _IN_PAIRS else _nibbles
    if layout in ("bits3", "pairs3"):
        low, high = nibbles(quads & 0x03030303), nibbles((quads >> 2) & 0x01010101)
        planes = [_in_twos(_lane_major(low, blocks)), _in_fours(_lane_major(high, blocks))]
        return torch.cat([plane.view(*blocks, -1) for plane in planes], -1)
    words = _lane_major(nibbles(quads), blocks)
    return (_in_twos(words) if layout in ("bits2", "pairs2") else words).view(*blocks, -1)


def unpack_codes(packed: Tensor, layout: Layout) -> Tensor:
    """The inverse: int32 [a, b, WORDS[layout]] -> uint8 [64 a, 64 b]."""
    blocks = packed.shape[0], packed.shape[1]
    of_nibbles = _quads_of_pairs if layout in _IN_PAIRS else _quads_of_nibbles
    if layout == "bits8":
        quads = _even_odd(_row_major(packed.view(*blocks, TILES, 8, 4, TILES, 2)).movedim(-1, 2))
    elif layout in ("bits3", "pairs3"):
        low, high = packed[..., :256].view(*blocks, TILES, 8, 4, 2), packed[..., 256:].view(*blocks, TILES, 8, 4)
        tops = torch.stack([(high >> k16) & 0x11111111 for k16 in range(TILES)], -1)
        quads = of_nibbles(_row_major(_from_twos(low))) | of_nibbles(_row_major(tops)) << 2
    else:
        lanes = packed.view(*blocks, TILES, 8, 4, -1)
        quads = of_nibbles(_row_major(_from_twos(lanes) if layout in ("bits2", "pairs2") else lanes))
    return quads.contiguous().view(torch.uint8).view(blocks[0] * SUPERBLOCK, blocks[1] * SUPERBLOCK)


def pack_trellis(codes: Tensor) -> Tensor:
    """uint8 [4 a, 4 b, 2 m], whole tiles -> int32 [a, b, 16 W]."""
    rows, columns, size = codes.shape
    if size % 4:
        codes = torch.cat([codes, codes[..., :2]], -1)
    tiles = codes.view(rows // TILES, TILES, columns // TILES, TILES, -1).transpose(1, 2)
    return tiles.contiguous().view(rows // TILES, columns // TILES, -1).view(torch.int32)


def unpack_trellis(packed: Tensor, row_bits: int) -> Tensor:
    """The inverse: int32 [a, b, 16 W] -> uint8 [4 a, 4 b, 2 m]."""
    a, b = packed.shape[:2]
    tiles = packed.contiguous().view(torch.uint8).view(a, b, TILES, TILES, -1).transpose(1, 2)
    return tiles.reshape(a * TILES, b * TILES, -1)[..., : 2 * row_bits]


def _lane_major(words: Tensor, blocks: tuple[int, int]) -> Tensor:
    """[a, n16, g, b * k16 * t, ...] -> [a, b, n16, g, t, k16, ...], contiguous."""
    rest = words.shape[4:]
    words = words.reshape(blocks[0], TILES, 8, blocks[1], TILES, 4, *rest)
    return words.permute(0, 3, 1, 2, 5, 4, *range(6, 6 + len(rest))).contiguous()


def _row_major(words: Tensor) -> Tensor:
    """The inverse: [a, b, n16, g, t, k16, ...] -> [a, n16, g, b * k16 * t, ...]."""
    words = words.permute(0, 2, 3, 1, 5, 4, *range(6, words.dim()))
    return words.reshape(*words.shape[:3], -1, *words.shape[6:])


def _even_odd(quads: Tensor) -> Tensor:
    """Bytes c0, c1, c2, c3 of every word <-> c0, c2, c1, c3: its own inverse."""
    return quads & -0xFFFF01 | (quads >> 8) & 0xFF00 | (quads & 0xFF00) << 8  # -0xFFFF01 is 0xFF0000FF


def _nibbles(quads: Tensor) -> Tensor:
    """[a, n16, half, g, n], bytes below 16 -> [a, n16, g, n], bytes row g | row g + 8 << 4, columns c0, c2, c1, c3."""
    return _even_odd(quads[:, :, 0] | quads[:, :, 1] << 4)


def _quads_of_nibbles(words: Tensor) -> Tensor:
    words = _even_odd(words)
    return torch.stack([words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F], 2)


def _pairs(quads: Tensor) -> Tensor:
    """As `_nibbles`, but a byte is a pair of columns of one row."""
    columns = (quads | quads >> 4) & 0x00FF00FF  # bytes (c0 | c1 << 4), 0, (c2 | c3 << 4), 0
    return columns[:, :, 0] | columns[:, :, 1] << 8


def _quads_of_pairs(words: Tensor) -> Tensor:
    columns = torch.stack([words & 0x00FF00FF, (words >> 8) & 0x00FF00FF], 2)
    return (columns | columns << 4) & 0x0F0F0F0F


def _in_twos(words: Tensor) -> Tensor:
    """[..., 4] nibble words below 4 -> [..., 2]: tiles 0 and 1, tiles 2 and 3."""
    return words[..., 0::2] | words[..., 1::2] << 2


def _from_twos(words: Tensor) -> Tensor:
    return torch.stack([words & 0x33333333, (words >> 2) & 0x33333333], -1).flatten(-2)


def _in_fours(words: Tensor) -> Tensor:
    """[..., 4] nibble words below 2 -> [...]: bit q of a nibble is tile q's."""
    return words[..., 0] | words[..., 1] << 1 | words[..., 2] << 2 | words[..., 3] << 3
