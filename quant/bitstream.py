"""Codes of 1 to 8 bits as a dense little-endian bit stream, one stream a row.

Element i of a row occupies bits i*b .. i*b+b-1 of that row's stream; bit j of the stream is bit j % 8 of byte j // 8.
A row takes ceil(n*b/8) bytes; the bits left over in its last byte are zero.

    b = 4:  byte 0 = [e1 e1 e1 e1 e0 e0 e0 e0]   byte 1 = [e3 .. e2 ..]
    b = 3:  byte 0 = [e2 e2 e1 e1 e1 e0 e0 e0]   byte 1 = [e5 e4 e4 e4 e3 e3 e3 e2]   byte 2 = ...
"""

from __future__ import annotations

from torch import Tensor


def row_bytes(n: int, bits: int) -> int:
    """Bytes of one row of n codes."""
    return (n * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] with values below 2**bits -> uint8 [rows, row_bytes(n, bits)]."""
    rows, n = codes.shape
    blocks = -(-n // 8)  # eight codes fill exactly `bits` bytes
    padded = codes
    if n % 8:
        padded = codes.new_zeros(rows, blocks * 8)
        padded[:, :n] = codes
    padded = padded.reshape(rows, blocks, 8)
    out = codes.new_zeros(rows, blocks, bits)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        out[..., byte] |= padded[..., i] << offset
        if offset + bits > 8:  # the code's upper bits are the lowest of the next byte
            out[..., byte + 1] |= padded[..., i] >> (8 - offset)
    return out.view(rows, -1)[:, : row_bytes(n, bits)].contiguous()


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse: uint8 [rows, row_bytes(n, bits)] -> uint8 [rows, n]."""
    rows = packed.shape[0]
    blocks = -(-n // 8)
    padded = packed
    if n % 8:
        padded = packed.new_zeros(rows, blocks * bits)
        padded[:, : packed.shape[1]] = packed
    padded = padded.reshape(rows, blocks, bits)
    codes = packed.new_empty(rows, blocks, 8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        code = padded[..., byte] >> offset
        if offset + bits > 8:
            code |= padded[..., byte + 1] << (8 - offset)
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :n].contiguous()
