"""torch's own linear layers on random weights: what every kernel is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .contender import Absent, Call, Contender

GROUP = 128
"""Columns that share a scale in torch's 4-bit kernel: 32, 64, 128 and 256 are there."""

NAMES = ("torch.float32", "torch.bfloat16", "torch.int4", "torch.int8")


def baseline_bytes(shape: tuple[int, int]) -> dict[str, int]:
    """{name: bytes of the weight}, before it is made."""
    n = shape[0] * shape[1]
    return {"torch.float32": 4 * n, "torch.bfloat16": 2 * n, "torch.int4": n // 2 + 4 * n // GROUP, "torch.int8": n}


def baseline(name: str, shape: tuple[int, int], generator: torch.Generator) -> Contender | Absent:
    """One of NAMES. Absent, with torch's own words, where it refuses the shape or lacks the kernel."""
    make, dtype = {
        "torch.float32": (lambda: _dense(shape, torch.float32, generator), torch.float32),
        "torch.bfloat16": (lambda: _dense(shape, torch.bfloat16, generator), torch.bfloat16),
        "torch.int4": (lambda: _int4(shape, generator), torch.bfloat16),
        "torch.int8": (lambda: _int8(shape, generator), torch.float32),
    }[name]
    x = torch.randn(1, shape[1], generator=generator).to(dtype)
    try:
        first = make()
        first(x)  # some shapes are refused at the first call only
    except (RuntimeError, AttributeError) as error:  # AttributeError: an operator that this torch lacks
        return Absent(name, "", str(error).partition("\n")[0])
    return Contender(
        kernel=name,
        scheme=f"group_size={GROUP}" if name == "torch.int4" else "",
        isa="",
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        nbytes=baseline_bytes(shape)[name],
        first=first,
        new_copy=make,
        to_input=_caster(dtype),
    )


def _caster(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def _dense(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Call:
    w = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
    return lambda x: functional.linear(x, w)


def _int4(shape: tuple[int, int], generator: torch.Generator) -> Call:
    out, n = shape
    codes = torch.randint(0, 16, shape, dtype=torch.int32, generator=generator)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(-(-n // GROUP), out, 2, generator=generator).mul_(0.01).bfloat16()  # with zero points
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def _int8(shape: tuple[int, int], generator: torch.Generator) -> Call:
    """Weights of 8 bits, a scale for all; activations quantized for each call."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*deprecated")
        weight = torch._make_per_tensor_quantized_tensor(codes, 0.01, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)  # True: 7 bits, as torch's modules have it
