"""Activations as int8, by Triton: the launcher of triton_device/activations.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .tile_codes import padded
from .triton_runtime import check_input, on_device

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int8 [tokens, KP], scale float32 [tokens], sum of a token's codes int32 [tokens]) of x [tokens, in].

    code = x * (127 / max |x|) to the nearest integer, ties to even; scale = max |x| / 127. KP is `in` rounded up to 64
    and every four codes stand in the order 0, 2, 1, 3. A token with NaN or infinity has scale NaN.
    """
    from .triton_device.activations import quantize_kernel

    check_input(x, x.shape[-1], FLOATS)
    tokens, columns = x.shape
    width = padded(columns)
    codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sum = torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        block = quantize_block(width)
        with on_device(x.device):
            quantize_kernel[(tokens,)](
                x,
                codes,
                scale,
                sum,
                columns,
                width,
                BLOCK=block,
                enable_fp_fusion=False,
                num_warps=quantize_warps(block),
            )
    return codes, scale, sum


def quantize_block(width: int) -> int:
    """Columns that a program reads at a time."""
    return min(4096, 1 << (width - 1).bit_length())


def quantize_warps(block: int) -> int:
    """16 values a thread."""
    return max(1, block // 512)
