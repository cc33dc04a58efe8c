"""The transforms of a layer's input: in torch, and as one object of the kernel's where it has them all.

Those of native code (csrc/cpu/input_transform.h) are shared: layers whose transforms are equal, byte for byte, hold one
and the same object, so `a.native is b.native` tells whether two layers may share a transformed input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..quant.hartley import DENSE_ODD, odd_part
from ..quant.native import cpu_module
from ..quant.order import unpack_order
from ..quant.rotate import sign_vector
from ..quant.transform import get_transform
from .base import Kernel, TransformingKernel
from .native_linear import NativeLinear


@dataclass(frozen=True, eq=False)
class InputTransforms:
    """What a layer does to its input, and why not natively, where it does not."""

    names: tuple[str, ...]
    fields: Mapping[str, Tensor]
    native: Any = None
    """What the kernel's `transformed_linear` takes (the CPU's: a native `InputTransform`), or None: nothing to do, or
    `why_not` says why torch does it."""
    why_not: str | None = None

    def apply(self, x: Tensor) -> Tensor:
        """T x over the last dimension, in the dtype of x, by torch."""
        for name in self.names:
            x = get_transform(name).apply_input(x, self.fields)
        return x

    def transpose(self, grad: Tensor) -> Tensor:
        """The gradient of x, float32 [tokens, in], from that of T x: T^T g is a row g of a weight with T undone."""
        for name in reversed(self.names):
            grad = get_transform(name).undo_weight(grad, self.fields)
        return grad


def transforms_of(
    kernel: Kernel, names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int
) -> InputTransforms:
    """The transforms of a layer that runs on this kernel, in the kernel's own form where it has one."""
    if isinstance(kernel, NativeLinear):
        return input_transforms(names, fields, in_features, kernel.resolve_isa())
    if not isinstance(kernel, TransformingKernel) or not names:
        return InputTransforms(names, fields)
    reason = kernel.why_not_transform(names, in_features)
    if reason is not None:
        return InputTransforms(names, fields, None, reason)
    return InputTransforms(names, fields, kernel.make_transform(names, fields, in_features))


def input_transforms(
    names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int, isa: int | None
) -> InputTransforms:
    """The transforms of a layer with `in_features` inputs. isa: the instruction set to run with; None: torch alone."""
    if isa is None or not names:
        return InputTransforms(names, fields)
    reason = why_not_native(names, fields, in_features)
    if reason is not None:
        return InputTransforms(names, fields, None, reason)
    with torch.inference_mode(False), torch.no_grad():
        contents = {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in sorted(fields.items())}
        key = (isa, in_features, names, tuple(contents.items()))
        native = _made.get(key)
        if native is None:
            native = _made[key] = cpu_module().InputTransform(isa, in_features)
            for name in names:
                _ADD[name](native, fields, in_features)
    return InputTransforms(names, fields, native)


def why_not_native(names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int) -> str | None:
    """None where native code has all these transforms for this width, else the reason in words."""
    for name in names:
        if name not in _ADD:
            return f"the transform {name!r} has no native form"
    if "rotate" in names and odd_part(in_features)[0] > DENSE_ODD:
        return f"a rotation of {in_features} columns has an odd part above {DENSE_ODD}, where torch's FFT is faster"
    device = next((t.device.type for t in fields.values() if t.device.type != "cpu"), None)
    return None if device is None else f"the transform's fields are on {device}"


_made: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()


def _add_rotate(native: Any, fields: Mapping[str, Tensor], in_features: int) -> None:
    signs = sign_vector(fields["signs"], in_features).contiguous()
    native.add_multiply(signs.data_ptr())
    native.add_rotate()


def _add_order(native: Any, fields: Mapping[str, Tensor], in_features: int) -> None:
    order = unpack_order(fields["order"], in_features).contiguous()
    native.add_gather(order.data_ptr())


def _add_scale(native: Any, fields: Mapping[str, Tensor], in_features: int) -> None:
    factors = fields["input_scale"].float().reciprocal().contiguous()
    native.add_multiply(factors.data_ptr())


_ADD: dict[str, Callable[[Any, Mapping[str, Tensor], int], None]] = {
    "rotate": _add_rotate,
    "order": _add_order,
    "scale": _add_scale,
}
