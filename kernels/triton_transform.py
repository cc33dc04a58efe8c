"""The transforms of a layer's input by Triton: launchers of triton_device/transform.py.

Steps are those of csrc/cpu/input_transform.h: multiply (signs of `rotate`, factors of `scale`), rotate, gather
(`order`). Between steps values are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..quant.hartley import DENSE_ODD, hartley_hadamard, odd_part
from ..quant.order import unpack_order
from ..quant.rotate import sign_vector
from .triton_runtime import check_input, on_device

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BLOCK, BLOCK_K = 64, 16
"""Rows or columns, and summands, of a small product, at most: tf32x3 splits its operands in registers, and with more
they spill (bench/static_triton.py)."""
_MULTIPLY_BLOCK = 1024
_TRANSFORMS = ("rotate", "scale", "order")


@dataclass(frozen=True)
class Step:
    """multiply: values float32 [in]; gather: values int32 [in]; rotate: values float32 [in] to multiply by before, or
    None, and matrices (R_a, R_b) of `rotation_split`, R_a where a is not 1."""

    kind: Literal["multiply", "rotate", "gather"]
    values: Tensor | None
    matrices: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass(frozen=True)
class TritonTransform:
    """What a layer with `columns` inputs does to them, on one device."""

    columns: int
    steps: tuple[Step, ...]

    def apply(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """T x [tokens, in] of `dtype`, by default that of x. ValueError for another x."""
        check_input(x, self.columns, FLOATS)
        with on_device(x.device):
            for index, step in enumerate(self.steps):
                to = (dtype or x.dtype) if index == len(self.steps) - 1 else torch.float32
                run = _rotate if step.kind == "rotate" else _multiply
                x = run(x, step, to)
        return x.to(dtype or x.dtype) if not self.steps else x


def why_not_transform(names: tuple[str, ...], columns: int) -> str | None:
    """None where Triton kernels do all these transforms for this width, else the reason in words."""
    for name in names:
        if name not in _TRANSFORMS:
            return f"the transform {name!r} has no Triton form"
    if "rotate" in names and odd_part(columns)[0] > DENSE_ODD:
        return f"a rotation of {columns} columns has an odd part above {DENSE_ODD}, where torch's FFT is faster"
    return None


def triton_transform(
    names: tuple[str, ...], fields: Mapping[str, Tensor], columns: int, device: torch.device
) -> TritonTransform:
    """The transforms of a layer, ready to run on `device`. ValueError with `why_not_transform`'s reason."""
    reason = why_not_transform(names, columns)
    if reason is not None:
        raise ValueError(f"transforms {list(names)}: {reason}; apply them through torch")
    steps = []
    for name in names:
        if name == "rotate":
            signs = sign_vector(fields["signs"], columns).to(device).contiguous()
            a, b = rotation_split(columns)
            steps.append(Step("rotate", signs, (None if a == 1 else _matrix(a, device), _matrix(b, device))))
        elif name == "scale":
            factors = fields["input_scale"].to(device).float().reciprocal().contiguous()
            steps.append(Step("multiply", factors))
        else:
            order = unpack_order(fields["order"], columns).to(device=device, dtype=torch.int32).contiguous()
            steps.append(Step("gather", order))
    return TritonTransform(columns, tuple(steps))


def _multiply(x: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
    from .triton_device.transform import multiply_kernel

    tokens, n = x.shape
    y = torch.empty(tokens, n, dtype=dtype, device=x.device)
    gather = step.kind == "gather"
    if tokens:
        multiply_kernel[tokens, -(-n // _MULTIPLY_BLOCK)](
            x,
            None if gather else step.values,
            step.values if gather else None,
            y,
            n,
            HAS_ORDER=gather,
            HAS_FACTORS=not gather,
            BLOCK=_MULTIPLY_BLOCK,
            enable_fp_fusion=True,
            num_warps=4,
        )
    return y


def _rotate(x: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
    from .triton_device.transform import rotate_columns_kernel, rotate_rows_kernel

    tokens, n = x.shape
    (a, b), (of_a, of_b) = rotation_split(n), step.matrices
    y = torch.empty(tokens, n, dtype=dtype if a == 1 else torch.float32, device=x.device)
    if not tokens:
        return y.to(dtype)
    lines, block, line_block = tokens * a, rotation_block(b), rotation_block(min(tokens * a, BLOCK))
    rotate_rows_kernel[-(-lines // line_block), -(-b // block)](
        x,
        step.values,
        of_b,
        y,
        lines,
        a,
        b,
        HAS_FACTORS=step.values is not None,
        BLOCK=block,
        LINE_BLOCK=line_block,
        BLOCK_K=BLOCK_K,
        enable_fp_fusion=True,
        num_warps=4,
    )
    if a == 1:
        return y
    z = torch.empty(tokens, n, dtype=dtype, device=x.device)
    rotate_columns_kernel[tokens, -(-a // rotation_block(a)), -(-b // block)](
        y,
        of_a,
        z,
        a,
        b,
        BLOCK_A=rotation_block(a),
        BLOCK_B=block,
        BLOCK_K=BLOCK_K,
        enable_fp_fusion=True,
        num_warps=4,
    )
    return z


def rotation_split(n: int) -> tuple[int, int]:
    """(a, b) with n = a b and b a power of two, a + b least: R_n = R_a (x) R_b. (1, n) for an odd n."""
    odd, log2 = odd_part(n)
    if log2 == 0:
        return 1, n
    return min(((odd << i, 1 << (log2 - i)) for i in range(log2 + 1)), key=sum)


def rotation_block(n: int) -> int:
    """A power of two that covers n, from 16 to BLOCK."""
    return min(BLOCK, max(16, 1 << (n - 1).bit_length()))


@lru_cache(maxsize=64)
def _matrix(n: int, device: torch.device) -> Tensor:
    """R of size n, float32 [n, n], symmetric."""
    with torch.inference_mode(False), torch.no_grad():
        return hartley_hadamard(torch.eye(n, device="cpu")).to(device).contiguous()
