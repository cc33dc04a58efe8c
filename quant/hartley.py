"""The Hartley-Hadamard transform: an orthonormal rotation of every size n, its own inverse, without padding.

n = p * 2^k with p odd (p the whole odd part, prime or not). With the last dimension read as [p, 2^k], row-major,

    R = DHT_p (x) H_{2^k}
    DHT_p[i, j] = cas(2 pi i j / p) / sqrt(p),  cas t = cos t + sin t     discrete Hartley transform
    H_{2^k}[i, j] = (-1)^popcount(i & j) / 2^(k/2)                        Hadamard matrix in Sylvester's order

Both factors are symmetric and orthonormal, so R = R^T = R^-1. This definition is part of the stored format.

For speed R is regrouped as A (x) B, A = DHT_p (x) H_{2^(k-j)} and B = H_{2^j}, of about equal size: two small matrix
products. A large odd part goes through the FFT (DHT = Re F - Im F) and needs no p x p matrix.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DENSE_ODD = 1024
"""Largest odd part taken as a dense matrix (4 MiB); beyond it the FFT has less work."""


def hartley_hadamard(x: Tensor) -> Tensor:
    """R x over the last dimension of x [..., n], any n >= 1; computed in float32, returned in the dtype of x."""
    n = x.shape[-1]
    odd, log2 = odd_part(n)
    y = x.float()
    if odd > DENSE_ODD:
        spectrum = torch.fft.fft(y.reshape(-1, odd, n // odd), dim=1, norm="ortho")
        y, odd = spectrum.real - spectrum.imag, 1
    inner = min(log2, round(math.log2(odd << log2) / 2))
    outer = log2 - inner
    y = y.reshape(-1, odd << outer, 1 << inner)  # [rows, A, B]
    if inner:
        y = y @ hartley_matrix(1, inner, y.device)
        y = hartley_matrix(odd, outer, y.device) @ y
    else:  # n odd: one matrix product instead of as many products as there are rows
        y = y.flatten(1) @ hartley_matrix(odd, outer, y.device)
    return y.reshape(x.shape).to(x.dtype)


def odd_part(n: int) -> tuple[int, int]:
    """(p, k) with n = p * 2^k and p odd."""
    log2 = (n & -n).bit_length() - 1
    return n >> log2, log2


@lru_cache(maxsize=64)
def hartley_matrix(odd: int, log2: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """DHT_odd (x) H_{2^log2}, computed in float64; kept, so not to be written to.

    Through numpy: a default dtype or device that is set while a model is built must not reach the cache, nor may
    what is cached be an inference tensor, which autograd refuses later.
    """
    index = np.arange(odd)
    angle = (2 * np.pi / odd) * (np.outer(index, index) % odd)
    matrix = (np.cos(angle) + np.sin(angle)) / math.sqrt(odd)
    for _ in range(log2):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2))
    with torch.inference_mode(False):
        return torch.from_numpy(matrix).to(dtype).to(device)
