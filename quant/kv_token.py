"""The cache format "token": a vector x [D] of one token and head as D codes of b bits and one fp16 gain.

    z = R (k - mean) for a key, R v for a value; R the Hartley-Hadamard transform of size D (quant/hartley.py)
    c_i = clamp(floor(z_i / s + 2^(b-1)), 0, 2^b - 1),   s = rms(z) * STEP[b]
    level l_i = 2 c_i - (2^b - 1), an odd whole number;   stored value = gain * l_i

The gain of a value is least squares, <z, l> / <l, l>. That of a key is unbiased, |z|^2 / <z, l>: the scores of z with
its stored self come out as |z|^2, where least squares would shrink them (by 12 % at 2 bits) and so favour the tokens
that are kept exactly. A score with query q is gain <R q, l> + <q, mean>, and <q, mean> is the same for every key of a
row, so softmax does not see it. An output is R^T sum p gain l.

A vector of zeros has gain 0. One with a NaN or an infinity has gain NaN, as attention over it would be. Codes of both
are 2^(b-1).

A row of codes, b = 2, 4, 8: the little-endian bit stream of quant/bitstream.py. b = 3: two planes,

    [ 2 D / 8 bytes: the low two bits of all codes, a 2-bit stream | D / 8 bytes: the high bits, a 1-bit stream ]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bitstream import pack_bits, unpack_bits
from .hartley import hartley_matrix, odd_part

STEP = {2: 0.9956867, 3: 0.5860194, 4: 0.3352006, 8: 0.0307624}
"""{bits: step of the uniform grid of 2^bits midpoints with least squared error for N(0, 1)}. The errors are .1188,
.0374, .0115 and 8.8e-5; fitting the gain afterwards does not move the minimum (tests/quant/test_kv_token.py computes
both)."""

GAIN_MOST = 65504.0
"""Of fp16. A larger gain is stored as this: the vector is then longer than any that fp16 activations can hold."""


def rotate(x: Tensor) -> Tensor:
    """R x over the last dimension of x [..., D]: float32, or float64 for float64.

    The transform of `hartley.hartley_hadamard`, which is its own inverse. Here it is additions in a fixed order, not a
    matrix product whose order of summation depends on the number of rows: a token must get the same bits alone as in a
    prompt.
    """
    odd, log2 = odd_part(x.shape[-1])
    y = (x if x.dtype == torch.float64 else x.float()).reshape(-1, odd, 1 << log2)
    for stage in range(log2):
        pairs = y.view(len(y), odd, -1, 2, 1 << stage)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), -2).view(len(y), odd, -1)
    y = y * (1 / math.sqrt(1 << log2))
    if odd > 1:
        matrix = hartley_matrix(odd, 0, y.device, y.dtype)
        y = sum((matrix[:, j, None] * y[:, j, None] for j in range(1, odd)), matrix[:, 0, None] * y[:, 0, None])
    return y.reshape(x.shape)


def encode(z: Tensor, bits: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., D], gain fp16 [...]) of rotated vectors z [..., D]; unbiased: the gain of keys.

    Sums are float64, so that they do not depend on how many vectors are encoded together.
    """
    half = 1 << (bits - 1)
    z = z.float()
    wide = z.double()
    energy = (wide * wide).sum(-1)
    scale = (energy / z.shape[-1]).sqrt().float() * STEP[bits]
    usable = scale.isfinite() & (scale > 0)
    position = torch.floor(z / torch.where(usable, scale, 1.0)[..., None] + half)
    position = torch.where(usable[..., None], position, float(half))
    codes = position.clamp_(0, 2 * half - 1).to(torch.uint8)
    level = levels(codes, bits).double()
    along = (wide * level).sum(-1)
    gain = energy / along if unbiased else along / (level * level).sum(-1)
    gain = torch.where(usable, gain.clamp(max=GAIN_MOST), torch.where(scale == 0, 0.0, float("nan")))
    return codes, gain.to(torch.float16)


def levels(codes: Tensor, bits: int) -> Tensor:
    """2 c - (2^b - 1), float32 [..., D]."""
    return codes.float().mul_(2).sub_((1 << bits) - 1)


def decode(codes: Tensor, gain: Tensor, bits: int) -> Tensor:
    """The stored vectors, still rotated (and keys still centered): float32 [..., D]."""
    return levels(codes, bits).mul_(gain.float()[..., None])


def packed_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a row of codes; head_dim in steps of 8."""
    return head_dim * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] with values below 2^bits -> uint8 [..., D bits / 8]."""
    rows = codes.reshape(-1, codes.shape[-1])
    if bits == 3:
        packed = torch.cat((pack_bits(rows & 3, 2), pack_bits(rows >> 2, 1)), 1)
    else:
        packed = pack_bits(rows, bits)
    return packed.view(*codes.shape[:-1], packed.shape[-1])


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [..., D bits / 8] -> uint8 [..., D]."""
    rows = packed.reshape(-1, packed.shape[-1])
    head_dim = 8 * rows.shape[1] // bits
    if bits == 3:
        low = head_dim // 4
        codes = unpack_bits(rows[:, :low], head_dim, 2) | unpack_bits(rows[:, low:], head_dim, 1) << 2
    else:
        codes = unpack_bits(rows, head_dim, bits)
    return codes.view(*packed.shape[:-1], head_dim)
