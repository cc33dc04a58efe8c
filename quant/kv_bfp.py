"""The cache formats "bfp32" and "bfp64": block floating point with sorted key channels, to compare with ("Accurate
Block Quantization in LLMs with Outliers", arXiv 2403.20137). Blocks of n = 32 or 64 channels of one token and head
share an exponent of one byte; codes are two's complement mantissas of b bits:

    e = floor(log2(max |x|)),   m = clamp(round(x 2^(b - 2 - e)), -2^(b-1), 2^(b-1) - 1)
    stored value = m 2^(e + 2 - b);   code = m + 2^(b-1);   exponent byte = e + 127

b + 8 / n bits an element, neither centered nor rotated. Rounding is to even at ties. An exponent byte of 0: the block
is zero (or below 2^-126); 255: it has a NaN or an infinity, and is NaN.

One large channel costs its whole block precision, so the paper sorts the channels of keys by the norms of W_k's rows,
that large ones share a block. It folds the order into W_q and W_k. Behind rotary embedding that is not exact: the
embedding turns channel i by the frequency of place i, and all heads and layers share the frequencies. Here the order is
applied to keys and queries after the embedding, where any order leaves every score as it was; D numbers are moved a
head and token. Rotary embedding mixes channels i and i + D/2, so the two count with the norm of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127
ZERO, NAN = 0, 255
"""Exponent bytes with a meaning of their own."""


def encode(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., D], exponents uint8 [..., D / block]) of x [..., D], D in steps of block."""
    half = 1 << (bits - 1)
    x = x.float().unflatten(-1, (-1, block))
    largest = x.abs().amax(-1)
    finite = largest.isfinite()
    _, exponent = torch.frexp(torch.where(finite, largest, 0.0))  # largest = f 2^exponent, f in [1/2, 1)
    byte = exponent + (BIAS - 1)
    used = finite & (largest > 0) & (byte > ZERO)
    mantissa = torch.ldexp(torch.where(used[..., None], x, 0.0), (bits - 1 - exponent)[..., None])
    codes = mantissa.round().clamp(-half, half - 1) + half
    byte = torch.where(used, byte, torch.where(finite, ZERO, NAN))
    return codes.to(torch.uint8).flatten(-2), byte.to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, bits: int) -> Tensor:
    """The stored vectors: float32 [..., D]."""
    block = codes.shape[-1] // exponents.shape[-1]
    mantissa = codes.float().unflatten(-1, (-1, block)) - (1 << (bits - 1))
    step = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - BIAS + 2 - bits)
    step = torch.where(exponents == ZERO, 0.0, torch.where(exponents == NAN, float("nan"), step))
    return (mantissa * step[..., None]).flatten(-2)


def channel_order(weight: Tensor, kv_heads: int, rotary: int, bias: Tensor | None = None) -> Tensor:
    """int64 [kv_heads, D]: each head's key channels by falling norm of their rows of W_k, weight [kv_heads * D, in].

    rotary: channels of a head that rotary embedding turns, 0 for none: place i with place i + rotary / 2. bias
    [kv_heads * D]: counts as one more column. Ties keep the model's order.
    """
    energy = weight.double().square().sum(-1)
    if bias is not None:
        energy = energy + bias.double().square()
    energy = energy.view(kv_heads, -1).clone()
    half = rotary // 2
    pair = energy[:, :half] + energy[:, half : 2 * half]
    energy[:, :half] = energy[:, half : 2 * half] = pair / 2
    return energy.argsort(dim=-1, descending=True, stable=True)
