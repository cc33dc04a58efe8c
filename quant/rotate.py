"""Transform `rotate`: random signs, then the Hartley-Hadamard transform: T x = R (s * x), orthonormal.

It spreads outliers of weights and inputs over all columns, so that both look Gaussian to the codec. The signs come
from the seed and the width alone, so layers that share an input share the rotation.

    signs  uint8 [ceil(in/8)]   bit j % 8 of byte j // 8 set: input j changes its sign; bits left over are zero
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .bitstream import unpack_bits
from .hartley import hartley_hadamard
from .scheme import Scheme
from .stats import Stats

_GAMMA = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def random_signs(seed: int, in_features: int) -> Tensor:
    """The field `signs`, uint8 [ceil(in/8)] on the CPU, a function of (seed, in_features) and nothing else.

    Counter-based: little-endian 64-bit words mix(key + (i + 1) * gamma), key = mix(mix(seed + gamma) + in_features),
    where mix is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) and arithmetic is modulo 2^64.
    """
    key = _mix((_mix((seed + _GAMMA) & _WORD) + in_features) & _WORD)
    words = [_mix((key + (i + 1) * _GAMMA) & _WORD) for i in range(-(-in_features // 64))]
    packed = np.array(words, dtype="<u8").view(np.uint8)[: -(-in_features // 8)].copy()
    if in_features % 8:
        packed[-1] &= (1 << in_features % 8) - 1
    return torch.from_numpy(packed)


def sign_vector(signs: Tensor, in_features: int) -> Tensor:
    """The field `signs` as float32 [in_features] of +1 and -1."""
    if signs.device.type == "cpu":  # a layer asks at every call, and all layers of one width have the same signs
        return _unpacked(signs.numpy().tobytes(), in_features)
    return 1.0 - 2.0 * unpack_bits(signs[None], in_features, 1)[0].float()


@lru_cache(maxsize=64)
def _unpacked(signs: bytes, in_features: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(signs, dtype=np.uint8), count=in_features, bitorder="little")
    with torch.inference_mode(False):  # what is cached must not be an inference tensor, which autograd refuses later
        return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32)).to(torch.float32)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class Rotate:
    name = "rotate"
    by_weight = False

    def fields(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"signs": ((-(-shape[1] // 8),), torch.uint8)}

    def choose(self, w: Tensor, stats: Stats | None, seed: int, scheme: Scheme) -> dict[str, Tensor]:
        return {"signs": random_signs(seed, w.shape[1]).to(w.device)}

    def apply_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return self.apply_input(w.float(), fields)  # T is orthogonal: W T^-1 = W T^T, T along every row of W

    def undo_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return hartley_hadamard(w.float()) * sign_vector(fields["signs"], w.shape[-1])

    def apply_input(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return hartley_hadamard(x.float() * sign_vector(fields["signs"], x.shape[-1])).to(x.dtype)

    def apply_stats(self, stats: Stats, fields: Mapping[str, Tensor]) -> Stats:
        """T H T^T. The mean of |T x| is not known from H: sqrt(2/pi * diagonal), as if T x were Gaussian."""
        half = self.apply_input(stats.hessian.float(), fields)  # H T^T
        hessian = self.apply_input(half.T, fields)
        hessian = (hessian + hessian.T) / 2
        absmean = (hessian.diagonal().clamp(min=0) * (2 / math.pi)).sqrt()
        return Stats(hessian, absmean, stats.tokens)


TRANSFORM = Rotate()
