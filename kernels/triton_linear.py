"""Products with packed weights by Triton: launchers of triton_device/linear.py and linear_int8.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_format import TileWeight
from .triton_launch import Launch, Problem, token_class
from .triton_runtime import check_input, on_device
from .triton_tuning import launch_for

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_SUM_BLOCK = 1024


def linear(x: Tensor, weight: TileWeight, bias: Tensor | None = None, launch: Launch | None = None) -> Tensor:
    """y [tokens, out] = x [tokens, in] W^T + bias in the dtype of x, float16 or bfloat16, summed in float32.

    launch: None for the one tuned for this GPU. The same launch gives the same bits from run to run. ValueError for
    another x. bfloat16: values that it cannot hold (levels of the trellis beyond 256, entries of a table) are rounded.
    """
    out, columns = weight.shape
    check_input(x, columns, SIXTEEN_BITS)
    y = x.new_empty(len(x), out)
    if len(x) == 0:
        return y

    def run(launch: Launch) -> None:
        _linear(x, weight, bias, y, launch)

    with on_device(x.device):
        if launch is None:
            problem = Problem("w16", weight.form, str(x.dtype)[6:], weight.shape, token_class(len(x)))
            launch = launch_for(problem, x.device, run)
        run(launch)
    return y


def _linear(x: Tensor, weight: TileWeight, bias: Tensor | None, y: Tensor, launch: Launch) -> None:
    from .triton_device.linear import linear_kernel, sum_parts_kernel

    (tokens, out), columns = y.shape, x.shape[1]
    parts = launch.parts
    to = y if parts == 1 else torch.empty(parts, tokens, out, dtype=torch.float32, device=x.device)
    linear_kernel[launch.grid(out, tokens)](
        x,
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.table,
        bias,
        to,
        tokens,
        out,
        columns,
        HAS_BIAS=bias is not None,
        SCALE_AT=weight.form.scale_at(launch.block_k),
        BLOCK_N=launch.block_n,
        BLOCK_M=launch.block_m,
        BLOCK_K=launch.block_k,
        PARTS=parts,
        STAGES=launch.stages,
        enable_fp_fusion=True,
        num_warps=launch.warps,
        **weight.form.constants(),
    )
    if parts > 1:
        grid = (-(-y.numel() // _SUM_BLOCK),)
        sum_parts_kernel[grid](
            to,
            bias,
            y,
            y.numel(),
            out,
            HAS_BIAS=bias is not None,
            PARTS=parts,
            BLOCK=_SUM_BLOCK,
            enable_fp_fusion=True,
            num_warps=4,
        )


def why_not_w4a8(weight: TileWeight) -> str | None:
    """None where `linear_w4a8` can multiply by this weight, else the reason in words."""
    form = weight.form
    if form.kind != "int" or form.layout != "bits4":
        return f"multiplies 4-bit int codes, not {form}"
    if form.group_size and (weight.group_scale is None or weight.group_offset is None):
        return f"groups of {form.group_size} need progressive scales"
    return None


def linear_w4a8(
    codes: Tensor,
    scale: Tensor,
    sum: Tensor,
    weight: TileWeight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """y [tokens, out] of `dtype` from activations as `triton_activations.quantize_activations` makes them.

    codes int8 [tokens, KP], scale float32 [tokens], sum int32 [tokens]. Sums over columns are int32 and exact; the rest
    is float32: sum * scale of the row * scale of the token + bias. ValueError for another weight or other activations.
    """
    out = weight.shape[0]
    reason = why_not_w4a8(weight)
    if reason is not None:
        raise ValueError(f"linear_w4a8 {reason}")
    check_input(codes, weight.codes.shape[1] * 64, (torch.int8,))
    y = torch.empty(len(codes), out, dtype=dtype, device=codes.device)
    if len(codes) == 0:
        return y

    def run(launch: Launch) -> None:
        _linear_w4a8(codes, scale, sum, weight, bias, y, launch)

    with on_device(codes.device):
        if launch is None:
            problem = Problem("w8", weight.form, str(dtype)[6:], weight.shape, token_class(len(codes)))
            launch = launch_for(problem, codes.device, run)
        run(launch)
    return y


def _linear_w4a8(
    codes: Tensor, scale: Tensor, sum: Tensor, weight: TileWeight, bias: Tensor | None, y: Tensor, launch: Launch
) -> None:
    from .triton_device.linear_int8 import linear_int8_kernel, sum_int8_parts_kernel

    tokens, (out, columns), form = len(codes), weight.shape, weight.form
    parts = launch.parts
    planes = y if parts == 1 else torch.empty(parts, tokens, out, dtype=torch.int32, device=codes.device)
    shared = {
        "SYMMETRIC_ZERO": form.zero or 0,
        "HAS_ZERO": form.zero is None and form.group_size == 0,
        "HAS_BIAS": bias is not None,
        "PER_GROUP": form.group_size > 0,
        "PARTS": parts,
    }
    linear_int8_kernel[launch.grid(out, tokens)](
        codes,
        scale,
        sum,
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.group_scale,
        weight.group_offset,
        bias,
        y,
        planes,
        tokens,
        out,
        columns,
        GROUP=form.group_size,
        BLOCK_N=launch.block_n,
        BLOCK_M=launch.block_m,
        BLOCK_K=launch.block_k,
        STAGES=launch.stages,
        enable_fp_fusion=True,
        num_warps=launch.warps,
        **shared,
    )
    if parts > 1:
        sum_int8_parts_kernel[-(-out // 128), -(-tokens // 8)](
            planes,
            scale,
            sum,
            weight.scale,
            weight.zero_point,
            bias,
            y,
            tokens,
            out,
            BLOCK_N=128,
            BLOCK_M=8,
            enable_fp_fusion=True,
            num_warps=4,
            **shared,
        )
