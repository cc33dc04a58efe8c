"""How long a compilation will take here: told before it starts.

Counted: matrix products of the calibration passes at the speed that one product shows now, and the search for codes at
the speed that a few tiles show now. What neither covers (reading, attention, norms) is in FORWARD_OVERHEAD, an
allowance: it is larger for small models.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ..quant.scheme import Scheme
from ..quant.solver import quantize_tensor
from .device import wait_for
from .run import tune_settings

FORWARD_OVERHEAD = 1.6
CHOICE_WEIGHTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Weights whose coding is timed, for every distinct scheme: on a GPU as many as fill it."""

_TOKENS, _WIDTH = 1024, 1024


def expected_seconds(compilation: Any) -> float:
    """Seconds that `Compilation.run` is expected to take from its start."""
    collected = compilation.stats is not None and (compilation.stats / "fingerprint.json").exists()
    tokens = compilation.calibration.tokens if compilation.needs_stats and not collected else 0
    flops, weights = 0.0, 0
    for name, weight in compilation.weights.items():
        if compilation.skeleton.block_of(name) is not None:
            n = weight.shape[-1]
            weights += math.prod(weight.shape)
            flops += 2 * 2 * math.prod(weight.shape) * tokens  # through the original and the quantized block
            flops += n * n * tokens / 2 * 1.3  # the second moment, half of it, shared by q, k, v and by gate and up
    if compilation.plan.tune:  # the original once, the compiled model there and back, 8 looks at the held-out text
        settings = tune_settings(compilation)
        flops += 2 * weights * settings.step_tokens * settings.steps * (1 + 3)
        flops += 2 * weights * 9 * settings.held_out_tokens
    seconds = FORWARD_OVERHEAD * flops / _matmul_speed(compilation.device) if flops else 0.0
    per_weight: dict[Scheme, float] = {}
    for name, scheme in compilation.schemes.items():
        bare = scheme.replace(transforms=())
        if bare not in per_weight:
            per_weight[bare] = _seconds_per_weight(bare, compilation.device)
        seconds += per_weight[bare] * math.prod(compilation.weights[name].shape)
    return seconds


def _matmul_speed(device: torch.device) -> float:
    """Operations a second of a float32 product of calibration's size, the best of three."""
    a, b = torch.ones(_TOKENS, _WIDTH, device=device), torch.ones(_WIDTH, _WIDTH, device=device)
    best = math.inf
    for _ in range(4):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _TOKENS * _WIDTH * _WIDTH / best


def _seconds_per_weight(scheme: Scheme, device: torch.device) -> float:
    """Of coding by rounding to nearest; feedback adds a few per cent (on a GPU, where each column waits for the one
    before it, some tenths of a second a layer)."""
    generator = torch.Generator("cpu").manual_seed(0)
    w = torch.randn(256, CHOICE_WEIGHTS[device.type] // 256, generator=generator, device="cpu").to(device)
    quantize_tensor(w[:32], scheme)  # tables, threads, code pages
    wait_for(device)
    start = time.perf_counter()
    quantize_tensor(w, scheme)
    wait_for(device)
    return (time.perf_counter() - start) / w.numel()
