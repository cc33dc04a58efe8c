"""The packed layout of csrc/cpu/codes.h: codes of 1 to 8 bits in planes of 4, 2 and 1 bits, tiles of 16 rows x 32.

    quads of a tile     uint8 [8 quads, 16 rows, 4 columns], a byte a code
    4-bit plane         4 registers [16, 4]: quad 2j | quad 2j + 1 << 4
    2-bit plane         2 registers: quad 4j | quad 4j + 1 << 2 | ...
    1-bit plane         1 register: quad 0 | quad 1 << 1 | ...

of the planes that the binary digits of `bits` name, low bits of the code in the wider plane; 8 bits are bytes.
"""

from __future__ import annotations

from torch import Tensor

from .rows import row_blocks

BLOCK_ROWS, TILE_COLUMNS, QUADS = 16, 32, 8


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, in] with values below 2**bits -> uint8 [blocks, tiles, bits, 16, 4]."""
    out, n = codes.shape
    tiles = -(-n // TILE_COLUMNS)
    packed = codes.new_empty(-(-out // BLOCK_ROWS), tiles, bits, BLOCK_ROWS, 4)
    for start, stop in row_blocks(out, n):  # temporaries stay small
        blocks = -(-(stop - start) // BLOCK_ROWS)
        padded = codes.new_zeros(blocks * BLOCK_ROWS, tiles * TILE_COLUMNS)
        padded[: stop - start, :n] = codes[start:stop]
        # [block, row, tile, quad, 4] -> [quad, block, tile, row, 4]
        quads = padded.view(blocks, BLOCK_ROWS, tiles, QUADS, 4).permute(3, 0, 2, 1, 4).contiguous()
        to = packed[start // BLOCK_ROWS :][:blocks]
        for at, (first, width, registers) in _planes(bits).items():
            together = QUADS // registers
            for j in range(registers):
                plane = to[:, :, at + j]
                plane.zero_()
                for k in range(together):
                    plane |= (quads[together * j + k] >> first & ((1 << width) - 1)) << width * k
    return packed


def unpack_planes(packed: Tensor, out: int, n: int, bits: int) -> Tensor:
    """The inverse: uint8 [out, n]."""
    codes = packed.new_empty(out, n)
    for start, stop in row_blocks(out, n):
        part = packed[start // BLOCK_ROWS :][: -(-(stop - start) // BLOCK_ROWS)]
        quads = part.new_zeros(QUADS, *part.shape[:2], BLOCK_ROWS, 4)
        for at, (first, width, registers) in _planes(bits).items():
            together = QUADS // registers
            for k in range(QUADS):
                quads[k] |= (part[:, :, at + k // together] >> width * (k % together) & ((1 << width) - 1)) << first
        codes[start:stop] = quads.permute(1, 3, 2, 0, 4).reshape(part.shape[0] * BLOCK_ROWS, -1)[: stop - start, :n]
    return codes


def by_block(values: Tensor) -> Tensor:
    """[out, groups] -> [blocks, groups, 16], rows beyond `out` zero."""
    out, groups = values.shape
    blocks = -(-out // BLOCK_ROWS)
    padded = values.new_zeros(blocks * BLOCK_ROWS, groups)
    padded[:out] = values
    return padded.view(blocks, BLOCK_ROWS, groups).transpose(1, 2).contiguous()


def by_row(values: Tensor, out: int) -> Tensor:
    """The inverse of `by_block`."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out].contiguous()


def _planes(bits: int) -> dict[int, tuple[int, int, int]]:
    """{first register: (lowest bit in the code, bits, registers)} of each plane."""
    if bits == 8:
        return {0: (0, 8, 8)}
    planes, first = {}, 0
    for width in (4, 2, 1):
        if bits & width:
            planes[first] = (first, width, width)  # a register holds one bit of all eight quads, or as much
            first += width
    return planes
