"""What Triton's interpreter computes wrongly with bfloat16, repaired for tests. On a GPU nothing of this is in use.

The interpreter keeps bfloat16 as numpy uint16. As of Triton 3.9 `tl.dot` multiplies those bits as integers, silently,
and a conversion from float32 truncates where a GPU rounds to nearest even.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, uint16: nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def float32_values(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, uint16 -> float32, exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Repair the interpreter of this process. Triton has been imported with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle(float32_values(operand.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        if source == tl.bfloat16:
            return cast(self, TensorHandle(float32_values(src.data), tl.float32), dst_type)
        return TensorHandle(bfloat16_bits(cast(self, src, tl.float32).data), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        # these are lambdas over self.cast_impl and find the repaired one
        assert hasattr(InterpreterBuilder, f"create_{name}"), f"Triton's interpreter has no create_{name} any more"
