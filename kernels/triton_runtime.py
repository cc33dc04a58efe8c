"""Triton on this machine: whether it is there, and whether its interpreter stands for a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
LEAST_VERSION = (3, 2)


@cache
def why_no_triton() -> str | None:
    """None where Triton can be imported, else the reason in words. Imports it: asked only where a GPU is."""
    try:
        import triton
        import triton.language
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        return f"Triton cannot be imported ({reason}); install it with: pip install 'bitpalette[cuda]'"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        return f"needs Triton {'.'.join(map(str, LEAST_VERSION))} or later, not {triton.__version__}"
    return None


def interpreting() -> bool:
    """Kernels are run by Triton's interpreter, on a CPU: in tests. Decided before Triton is imported, for good."""
    return os.environ.get(INTERPRETER_VARIABLE) == "1"


def why_not_device(device: torch.device) -> str | None:
    """None where Triton kernels run on this device, else the reason in words."""
    if device.type == "cpu" and interpreting():
        return why_no_triton()
    if device.type != "cuda":
        return f"runs on a GPU, not on {device.type}"
    return why_no_triton()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches in this block go to `device`: Triton takes the current one, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_input(x: Tensor, columns: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless x is [tokens, columns], contiguous, of one of the dtypes and on a device of Triton's."""
    if x.ndim != 2 or x.shape[1] != columns or x.dtype not in dtypes or not x.is_contiguous():
        raise ValueError(
            f"x is contiguous [tokens, {columns}] of {', '.join(str(d) for d in dtypes)}; "
            f"got {x.dtype} {list(x.shape)} with strides {list(x.stride())}"
        )
    reason = why_not_device(x.device)
    if reason is not None:
        raise ValueError(f"x is on {x.device}, where Triton kernels do not run: {reason}")
