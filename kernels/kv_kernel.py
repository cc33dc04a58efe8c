"""What a kernel of the packed cache is, and how one is chosen."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import KVError, KVFormat
from . import kv_reference
from .kv_cpu import KVCpu
from .kv_cuda import KVCuda
from .kv_parts import Dense, Pages
from .kv_rows import KVRows
from .kv_triton import KVTriton

FORCE_VARIABLE = "BITPALETTE_KV_KERNEL"
REFERENCE = "reference"


class KVKernel(Protocol):
    """One backend for some formats and one kind of device. Stateless: one object serves every layer."""

    name: str
    most_tokens: int
    """New tokens of a call to `attention`. More of them are for the reference: it decodes pages for a matrix product,
    which is faster then."""

    @property
    def device_type(self) -> str:
        """Of the tensors that it reads."""

    def why_not(self, form: KVFormat, head_dim: int, head_dim_v: int) -> str | None:
        """None where caches of this form are for this kernel, else the reason in words."""

    def attention(
        self,
        query: Tensor,
        rows: KVRows,
        new: tuple[Tensor, Tensor] | None,
        skip: NDArray[np.int64],
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """What `kv_reference.attention` computes."""

    def attend(
        self,
        q: Tensor,
        pages: Pages,
        sinks: Dense | None = None,
        window: Dense | None = None,
        fresh: Dense | None = None,
        *,
        scale: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        start: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """The same over parts whose lengths stand in tensors, queries and result rotated: `kv_cpu.KVCpu.attend`. On a
        device nothing is read on the host."""

    def append(
        self,
        x: Tensor,
        slots: Tensor,
        codes: Tensor,
        gain: Tensor,
        bits: int,
        unbiased: bool,
        mean: Tensor | None = None,
    ) -> None:
        """x [n, kv_heads, D], rotated, into slots int64 [n] of codes and gain, as `kv_token.encode` and `pack` do. On a
        device a slot of -1 says that there is nothing to write."""

    def rotate(self, x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
        """`kv_token.rotate` of x - mean, as `dtype`; None: that of x."""


@lru_cache(maxsize=1)
def kernels() -> dict[str, KVKernel]:
    """In the order of choice; the reference, which runs everything, is none of them."""
    every: tuple[KVKernel, ...] = (KVCpu(), KVCuda(), KVTriton())
    return {kernel.name: kernel for kernel in every}


def choose(form: KVFormat, head_dim: int, head_dim_v: int, device: torch.device) -> KVKernel | None:
    """The kernel for a layer's cache on `device`, None for the reference.

    BITPALETTE_KV_KERNEL=name forces one. KVError where it cannot, with its reason. Called once a layer.
    """
    forced = os.environ.get(FORCE_VARIABLE)
    if forced == REFERENCE:
        return None
    if forced:
        if forced not in kernels():
            names = [*kernels(), REFERENCE]
            raise KVError(f"{FORCE_VARIABLE}={forced} names no kernel of the cache; there are {names}")
        if (reason := why_not(forced, form, head_dim, head_dim_v, device)) is not None:
            raise KVError(
                f"{FORCE_VARIABLE}={forced} cannot serve {form} on {device}: {reason}; "
                f"unset {FORCE_VARIABLE} to let bitpalette choose"
            )
        return kernels()[forced]
    for name, kernel in kernels().items():
        if why_not(name, form, head_dim, head_dim_v, device) is None:
            return kernel
    return None


def why_not(name: str, form: KVFormat, head_dim: int, head_dim_v: int, device: torch.device) -> str | None:
    """None where this kernel can, else the reason in words."""
    kernel = kernels()[name]
    if kernel.device_type != device.type:
        return f"it runs on {kernel.device_type}"
    if form.kind != "token":
        return f"kernels read the kind 'token'; {form.kind!r} is for comparison, and read by the reference"
    return kernel.why_not(form, head_dim, head_dim_v)


def attention(
    kernel: KVKernel | None,
    query: Tensor,
    rows: KVRows,
    new: tuple[Tensor, Tensor] | None,
    skip: NDArray[np.int64],
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`kv_reference.attention`, by the kernel up to its most tokens."""
    if kernel is None or query.shape[2] > kernel.most_tokens:
        return kv_reference.attention(query, rows, new, skip, scaling, softcap, sliding_window, sink_logits)
    return kernel.attention(query, rows, new, skip, scaling, softcap, sliding_window, sink_logits)
