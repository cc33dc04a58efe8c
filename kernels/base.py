"""What a backend is, and how one is chosen.

A kernel multiplies by the weight as the codec stores it. Transforms of the input (`quant/transform.py`) are applied by
the layer before, so a kernel sees schemes without transforms and the codec's own fields only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..quant.codec import get_codec
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .measured_choice import measured_order
from .registry import kernels

FORCE_VARIABLE = "BITPALETTE_KERNEL"


class KernelError(RuntimeError):
    """No kernel can do what was asked, or the one that was forced cannot. The message says why, in words."""


@dataclass
class Packed:
    """A weight [out_features, in_features] in a kernel's own layout: named tensors, all on one device.

    For a stack of experts `shape` is that of one, and every tensor has a leading dimension of experts.
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    handle: Any = None
    """What a kernel keeps with the tensors to find them faster, such as their addresses. Never copied or stored."""

    def expert(self, index: int) -> Packed:
        """One expert of a stack; its tensors are views."""
        return Packed(self.scheme, self.shape, {name: t[index] for name, t in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Kernel(Protocol):
    """One backend for some schemes, shapes and devices. Stateless: one object serves every layer."""

    name: str
    rank: int
    """Order of choice: the lowest that can is taken. The reference has the highest."""
    canonical: bool
    """The packed tensors are the codec's fields themselves, under their own names."""

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """None where the kernel can run this weight on this device, else the reason in words."""

    def prepare(self, qt: QuantizedTensor) -> Packed:
        """The kernel's layout of a two-dimensional weight without transforms, on the device of its fields."""

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        """The exact inverse of `prepare`, bit for bit."""

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """y [tokens, out] = x [tokens, in] W^T + bias, in the dtype of x (float32, float16 or bfloat16)."""

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        """Rows of W, float32 [n, in], for index int64 [n]; exactly what the codec decodes."""


@runtime_checkable
class TransformingKernel(Protocol):
    """A kernel that applies the transforms of a layer's input itself, in a form of its own."""

    def why_not_transform(self, names: tuple[str, ...], in_features: int) -> str | None:
        """None where it has all these transforms for this width, else the reason in words."""

    def make_transform(self, names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int) -> Any:
        """The transforms, ready to run where the fields are."""

    def transformed_linear(self, x: Tensor, packed: Packed, bias: Tensor | None, transform: Any) -> Tensor:
        """y [tokens, out] = T(x) W^T + bias for x [tokens, in]; transform: of `make_transform`."""


def choose(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> Kernel:
    """The kernel for a weight of `shape` on `device`: the forced one, else the fastest that can.

    Fastest by what was measured for this scheme, shape and GPU (`measured_choice`), else by rank.
    BITPALETTE_KERNEL=name forces one. KernelError where it cannot, with its reason. Called once a layer, at prepare.
    """
    bare = scheme.replace(transforms=())
    forced = os.environ.get(FORCE_VARIABLE)
    if forced:
        if forced not in kernels():
            raise KernelError(f"{FORCE_VARIABLE}={forced} names no kernel; there are {list(kernels())}")
        reason = kernels()[forced].why_not(bare, shape, device)
        if reason is not None:
            raise KernelError(
                f"{FORCE_VARIABLE}={forced} cannot run {scheme} {list(shape)} on {device}: {reason}; "
                f"unset {FORCE_VARIABLE} to let bitpalette choose"
            )
        return kernels()[forced]
    order = measured_order(bare, shape, device)
    reasons = []
    for kernel in sorted(kernels().values(), key=lambda kernel: order.get(kernel.name, len(order))):
        reason = kernel.why_not(bare, shape, device)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise KernelError(f"no kernel runs {scheme} {list(shape)} on {device}: {'; '.join(reasons)}")


def explain(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> dict[str, str | None]:
    """{kernel: why not, or None where it can}, by rank: the answer to "why is this layer slow?"."""
    bare = scheme.replace(transforms=())
    return {name: kernel.why_not(bare, shape, device) for name, kernel in kernels().items()}


def codec_fields(scheme: Scheme, shape: tuple[int, int]) -> list[str]:
    """The names of the codec's own fields: those that a kernel packs, without those of the transforms."""
    return list(get_codec(scheme.codec).fields(scheme, shape))
