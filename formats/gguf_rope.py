"""Llama 3's scaled rotary frequencies, which a GGUF file states as one factor a frequency and transformers as a rule.

llama.cpp writes `rope_freqs.weight` [head_dim / 2]: what each inverse frequency is divided by. transformers computes
the same from `rope_type: llama3` (Llama 3.1's model card): wavelengths below original / high are kept, those above
original / low are stretched by `factor`, and in between the two are blended. The factors are recomputed here from the
rule and compared, so a file that follows another rule is refused instead of read wrongly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
"""low_freq_factor, high_freq_factor, original_max_position_embeddings of every Llama 3.1, 3.2 and 3.3."""


def llama3_factors(theta: float, count: int, factor: float) -> Tensor:
    """What the rule divides inverse frequency i = theta^(-i / count) by, float64 [count]."""
    wavelength = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    smooth = ((ORIGINAL / wavelength - LOW) / (HIGH - LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def rope_parameters(theta: float, factors: Tensor) -> dict[str, Any] | None:
    """transformers' `rope_parameters` for the factors [head_dim / 2] of a file; None where no rule gives them."""
    factors = factors.double()
    if bool((factors == 1).all()):
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(factors.max())
    if not math.isfinite(factor) or factor <= 1 or theta <= 1:
        return None
    if not torch.allclose(llama3_factors(theta, len(factors), factor), factors, rtol=1e-4, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    }
