"""Small floating point formats: the elements and scales of the OCP Microscaling (MX) specification 1.0, in float32.

format  code                      bias  largest                            value of a code, e > 0
e2m1    [s | e e | m]             1     6                                  (-1)^s 2^(e - bias) (1 + m / 2^mantissa)
e3m2    [s | e e e | m m]         3     28                                 e = 0: (-1)^s 2^(1 - bias) m / 2^mantissa
e2m3    [s | e e | m m m]         1     7.5
e4m3    [s | e e e e | m m m]     7     448, 0x7F and 0xFF are NaN         no infinities
e8m0    [e e e e e e e e]         127   2^127, 0xFF is NaN                 2^(e - bias), scales only
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minifloat:
    """A format with a sign. bits: of a code; mantissa: of these, those of the mantissa."""

    name: str
    bits: int
    mantissa: int
    bias: int
    largest: float

    @property
    def least_exponent(self) -> int:
        """Of normal values, and of the steps between those below."""
        return 1 - self.bias

    @cached_property
    def values(self) -> Tensor:
        """The value of every code, float32 [2^bits] on the CPU."""
        half, magnitudes = 1 << (self.bits - 1), []
        for code in range(half):
            e, m = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
            fraction = m / (1 << self.mantissa) + (e > 0)
            value = fraction * 2.0 ** (max(e, 1) - self.bias)
            magnitudes.append(value if value <= self.largest else math.nan)
        with torch.inference_mode(False):
            positive = torch.tensor(magnitudes, dtype=torch.float32, device="cpu")
            return torch.cat([positive, -positive])

    def round(self, u: Tensor) -> Tensor:
        """The nearest values (midway the one with an even code) to u float32, at most `largest` away from zero."""
        u = u.clamp(-self.largest, self.largest)
        step = self._step(u)
        return torch.round(u / step).mul_(step)

    def encode(self, u: Tensor) -> Tensor:
        """Codes uint8 of `round(u)`; zeros are positive."""
        value = self.round(u)
        size = value.abs()
        step = self._step(size)
        exponent = (step.view(torch.int32) >> 23) - (127 + self.least_exponent - self.mantissa)  # above the least
        # a mantissa of 2^mantissa and more belongs to the exponent above: both add up to the code
        code = (size / step).to(torch.int32) + (exponent << self.mantissa)
        return (code | (value < 0).to(torch.int32) << (self.bits - 1)).to(torch.uint8)

    def _step(self, u: Tensor) -> Tensor:
        """The distance of values in the binade of u: 2^(floor(log2 |u|) - mantissa), not below that at zero."""
        binade = (u.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # |u| with the mantissa cut off
        return binade.clamp(min=2.0**self.least_exponent).mul_(2.0**-self.mantissa)


E2M1 = Minifloat("e2m1", 4, 1, 1, 6.0)
E3M2 = Minifloat("e3m2", 6, 2, 3, 28.0)
E2M3 = Minifloat("e2m3", 6, 3, 1, 7.5)
E4M3 = Minifloat("e4m3", 8, 3, 7, 448.0)
ELEMENTS = {format.name: format for format in (E2M1, E3M2, E2M3, E4M3)}


def e8m0_values(codes: Tensor) -> Tensor:
    """uint8 -> float32 powers of two, exactly: 2^(code - 127), NaN for 255."""
    bits = codes.to(torch.int32) << 23
    bits = torch.where(codes == 0, 0x00400000, bits)  # 2^-127 is subnormal in float32
    return torch.where(codes == 255, 0x7FC00000, bits).view(torch.float32)


def round_to_power_of_two(scale: Tensor) -> Tensor:
    """The nearest of 2^-126 to 2^127 to scale, float32 >= 0; midway the larger."""
    bits = (scale.contiguous().view(torch.int32) + 0x00400000) & 0x7F800000
    return bits.clamp(1 << 23, 254 << 23).view(torch.float32)


def e8m0_codes(powers: Tensor) -> Tensor:
    """uint8 codes of float32 powers of two from 2^-126 on."""
    return (powers.contiguous().view(torch.int32) >> 23).to(torch.uint8)
