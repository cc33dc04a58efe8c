"""Packed weights as numbers, by Triton: the launcher of triton_device/dense.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_format import TileWeight
from .triton_runtime import on_device, why_not_device

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_BLOCK = (16, 128)
"""Rows and columns a program."""


def dequantize(weight: TileWeight, dtype: torch.dtype) -> Tensor:
    """W [out, in] of `dtype` (float16, bfloat16, float32): what the codec decodes, rounded once."""
    return _dense(weight, None, weight.shape[0], dtype)


def rows(weight: TileWeight, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of W [n, in] for index int64 [n], each inside 0..out - 1: that is the caller's to check."""
    if index.ndim != 1 or index.dtype != torch.int64 or index.device != weight.codes.device:
        raise ValueError(
            f"index is int64 [n] on {weight.codes.device}; got {index.dtype} {list(index.shape)} on {index.device}"
        )
    return _dense(weight, index.contiguous(), len(index), dtype)


def _dense(weight: TileWeight, index: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    from .triton_device.dense import dense_kernel

    if dtype not in DTYPES:
        raise ValueError(f"weights are written as one of {', '.join(map(str, DTYPES))}; got {dtype}")
    device = weight.codes.device
    reason = why_not_device(device)
    if reason is not None:
        raise ValueError(f"the weight is on {device}, where Triton kernels do not run: {reason}")
    out, columns = weight.shape
    y = torch.empty(count, columns, dtype=dtype, device=device)
    block_r, block_k = DENSE_BLOCK
    if count:
        with on_device(device):
            dense_kernel[-(-count // block_r), -(-columns // block_k)](
                weight.codes,
                weight.scale,
                weight.zero_point,
                weight.table,
                index,
                y,
                out,
                columns,
                count,
                HAS_INDEX=index is not None,
                BLOCK_R=block_r,
                BLOCK_K=block_k,
                enable_fp_fusion=True,
                num_warps=4,
                **weight.form.constants(),
            )
    return y
