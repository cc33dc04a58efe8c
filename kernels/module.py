"""A module that holds quantized weights: canonical buffers on the outside, a kernel's own layout while it runs.

Outside (construction, `state_dict`, `load_state_dict`, pickle, deepcopy, offloading) a weight named W is the buffers W
(codes) and W_<field>, as `quant.tensor.field_specs` declares. `prepare` chooses the kernel for the device and builds
its layout; unless that layout is the canonical one, the codec's buffers are then released and the packed tensors take
their place as non-persistent buffers packed_<W>_<tensor>. Whatever needs the canonical fields later gets them from the
kernel's exact inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.scheme import Scheme, SchemeError
from ..quant.tensor import QuantizedTensor, field_specs, stack, unstack
from .base import Kernel, KernelError, Packed, choose, codec_fields
from .registry import kernels
from .torch_ops import key_of


def buffer_name(weight: str, field: str) -> str:
    """The name in a state_dict: codes stand under the weight's own name, other fields behind it."""
    return weight if field == "codes" else f"{weight}_{field}"


class QuantModule(nn.Module):
    """Base of QuantLinear, QuantEmbedding and QuantExperts. Weights are frozen buffers; their dtypes never change."""

    def __init__(self) -> None:
        super().__init__()
        self._schemes: dict[str, Scheme] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._transform_names: dict[str, list[str]] = {}  # the fields that are the transforms', not the codec's
        self._prepared: dict[str, tuple[str, torch.device]] = {}
        # what `_ready` found, with the codes that it found it for: other codes under that name make it stale
        self._ready_cache: dict[str, tuple[str, Tensor, Kernel, Packed]] = {}
        self._key = key_of(self)  # by which ops in a compiled graph find this module

    # -- declaring and filling

    def _declare(self, weight: str, scheme: Scheme, shape: tuple[int, ...], device: Any = None) -> None:
        """Register empty canonical buffers for a weight [out, in] or [experts, out, in]."""
        self._schemes[weight], self._shapes[weight] = scheme, shape
        specs, own = field_specs(scheme, shape), codec_fields(scheme, (shape[-2], shape[-1]))
        self._transform_names[weight] = [field for field in specs if field not in own]
        for field, (size, dtype) in specs.items():
            self.register_buffer(buffer_name(weight, field), torch.empty(size, dtype=dtype, device=device))

    def _fill(self, weight: str, qt: QuantizedTensor) -> None:
        """Take the fields of qt, without a copy, in place of the present ones."""
        if qt.scheme != self._schemes[weight] or qt.shape != self._shapes[weight]:
            raise SchemeError(
                f"{weight} is {self._schemes[weight]} {list(self._shapes[weight])}, got {qt.scheme} {list(qt.shape)}"
            )
        self.unprepare()
        for field, tensor in qt.fields.items():
            self._buffers[buffer_name(weight, field)] = tensor

    def _canonical(self, weight: str) -> QuantizedTensor:
        """The weight's fields in canonical layout, through the kernel's inverse where it is prepared."""
        scheme, shape = self._schemes[weight], self._shapes[weight]
        fields = {field: self._buffers.get(buffer_name(weight, field)) for field in field_specs(scheme, shape)}
        if weight in self._prepared and not self._kernel(weight).canonical:
            kernel, packed = self._kernel(weight), self._packed(weight)
            if len(shape) == 2:
                whole = kernel.unprepare(packed)
            else:
                whole = stack([kernel.unprepare(packed.expert(e)) for e in range(shape[0])])
            device = self._tensors(weight)[0].device
            fields.update({name: tensor.to(device) for name, tensor in whole.fields.items()})
        return QuantizedTensor(scheme, shape, {name: t for name, t in fields.items() if t is not None})

    def _transform_fields(self, weight: str, expert: int | None = None) -> dict[str, Tensor]:
        """The fields of the scheme's transforms; these stay canonical always."""
        fields: dict[str, Tensor] = {}
        for name in self._transform_names[weight]:
            tensor = self._buffers[buffer_name(weight, name)]
            assert tensor is not None  # registered by _declare, and never released
            fields[name] = tensor if expert is None else tensor[expert]
        return fields

    # -- preparing

    def prepare(self) -> None:
        """Choose the kernel of every weight for the device it is on, and build the kernel's layout. Done once."""
        for weight in self._schemes:
            if weight not in self._prepared:
                self._prepare(weight)

    @torch.no_grad()
    def _prepare(self, weight: str) -> None:
        qt = self._canonical(weight)
        device = qt.fields["codes"].device
        if device.type == "meta":
            raise KernelError(f"{type(self).__name__}: the weights are on the meta device; load them first")
        kernel = self._choose(weight, device)
        self._prepared[weight] = (kernel.name, device)
        if kernel.canonical:
            return
        matrix = (qt.shape[-2], qt.shape[-1])
        own = codec_fields(qt.scheme, matrix)
        bare = QuantizedTensor(qt.scheme.replace(transforms=()), qt.shape, {f: qt.fields[f] for f in own})
        parts = [kernel.prepare(part).tensors for part in ([bare] if len(qt.shape) == 2 else unstack(bare))]
        for field in own:
            del self._buffers[buffer_name(weight, field)]
        for name in list(parts[0]):
            tensor = parts[0][name] if len(qt.shape) == 2 else torch.stack([part.pop(name) for part in parts])
            self.register_buffer(_packed_name(weight, name), tensor, persistent=False)

    def _choose(self, weight: str, device: torch.device) -> Kernel:
        shape = self._shapes[weight]
        return choose(self._schemes[weight], (shape[-2], shape[-1]), device)

    @torch.no_grad()
    def unprepare(self) -> None:
        """Back to canonical buffers, bit for bit; the next forward prepares again."""
        self._ready_cache.clear()
        for weight in list(self._prepared):
            if not self._kernel(weight).canonical:
                qt = self._canonical(weight)
                for name in self._packed_names(weight):
                    del self._buffers[name]
                    self._non_persistent_buffers_set.discard(name)
                for field, tensor in qt.fields.items():
                    self._buffers[buffer_name(weight, field)] = tensor
            del self._prepared[weight]

    @property
    def kernel_names(self) -> dict[str, str]:
        """{weight: name of the kernel that runs it}; empty before `prepare`."""
        return {weight: name for weight, (name, _) in self._prepared.items()}

    def _kernel(self, weight: str) -> Kernel:
        return kernels()[self._prepared[weight][0]]

    def _packed_names(self, weight: str) -> list[str]:
        prefix = _packed_name(weight, "")
        return [name for name in self._buffers if name.startswith(prefix)]

    def _tensors(self, weight: str) -> list[Tensor]:
        """The tensors that hold the codes at present, packed or canonical."""
        names = self._packed_names(weight) or [weight]
        return [tensor for name in names if (tensor := self._buffers[name]) is not None]

    def _packed(self, weight: str) -> Packed:
        """The packed weight, or stack, on the device it was prepared for."""
        kernel_name, device = self._prepared[weight]
        return self._gather(weight, kernels()[kernel_name], device)

    def _gather(self, weight: str, kernel: Kernel, device: torch.device) -> Packed:
        scheme, shape = self._schemes[weight].replace(transforms=()), self._shapes[weight]
        matrix = (shape[-2], shape[-1])
        if kernel.canonical:
            names = {field: buffer_name(weight, field) for field in codec_fields(scheme, matrix)}
        else:
            skip = len(_packed_name(weight, ""))
            names = {name[skip:]: name for name in self._packed_names(weight)}
        tensors = {key: self._buffers[name].to(device) for key, name in names.items()}  # type: ignore[union-attr]
        if kernel.canonical and len(shape) == 3:
            tensors["codes"] = tensors["codes"].view(shape[0], -1)
        return Packed(scheme, matrix, tensors)

    # -- running

    def _ready(self, weight: str) -> tuple[Kernel, Packed]:
        """The kernel and the packed weight (or stack) of this call. Prepares at the first, and again after a move."""
        if offloads_buffers(self):
            # accelerate brings the canonical buffers in for this call only: packing them each time, or keeping a
            # packed copy behind its back, would defeat the offloading
            self.unprepare()
            kernel = kernels()["reference"]
            return kernel, self._gather(weight, kernel, self._tensors(weight)[0].device)
        cached = self._ready_cache.get(weight)
        if cached is not None and self._buffers.get(cached[0]) is cached[1]:
            return cached[2], cached[3]
        if weight in self._prepared and self._tensors(weight)[0].device != self._prepared[weight][1]:
            self.unprepare()
        if weight not in self._prepared:
            self._prepare(weight)
        kernel, packed = self._kernel(weight), self._packed(weight)
        name = (self._packed_names(weight) or [weight])[0]
        self._ready_cache[weight] = (name, self._tensors(weight)[0], kernel, packed)
        return kernel, packed

    # -- what torch does to modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves devices as torch does, and never casts a field: fn sees the bytes of each as uint8."""
        for weight in list(self._prepared):
            tensor = self._tensors(weight)[0]
            if fn(torch.empty(0, dtype=torch.uint8, device=tensor.device)).device != tensor.device:
                self.unprepare()
                break
        own = {id(tensor) for weight in self._schemes for tensor in self._all_tensors(weight)}

        def by_bytes(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            moved = fn(tensor.contiguous().flatten().view(torch.uint8))
            return moved.view(tensor.dtype).view(tensor.shape)

        self._ready_cache.clear()
        return super()._apply(by_bytes, recurse)

    def _all_tensors(self, weight: str) -> list[Tensor]:
        names = [buffer_name(weight, f) for f in field_specs(self._schemes[weight], self._shapes[weight])]
        found = (self._buffers.get(name) for name in [*names, *self._packed_names(weight)])
        return [tensor for tensor in found if tensor is not None]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for weight in self._prepared:
            for field, tensor in self._canonical(weight).fields.items():
                destination[prefix + buffer_name(weight, field)] = tensor

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.unprepare()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Canonical buffers: a copy or a pickle is free of the machine it was made on, and prepares anew."""
        state = self.__dict__.copy()
        buffers = dict(self._buffers)
        for weight in self._prepared:
            qt = self._canonical(weight)
            for name in self._packed_names(weight):
                del buffers[name]
            buffers.update({buffer_name(weight, field): tensor for field, tensor in qt.fields.items()})
        state["_buffers"] = buffers
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set & buffers.keys()
        state["_prepared"], state["_ready_cache"] = {}, {}
        del state["_key"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._key = key_of(self)

    def __getattr__(self, name: str) -> Any:
        """A canonical field by its name also while it is prepared (a fresh tensor then)."""
        state = self.__dict__
        for weight in state.get("_prepared", ()):
            if (name == weight or name.startswith(weight + "_")) and name not in self._buffers:
                for field, tensor in self._canonical(weight).fields.items():
                    if name == buffer_name(weight, field):
                        return tensor
        return super().__getattr__(name)


def _packed_name(weight: str, tensor: str) -> str:
    return f"packed_{weight}_{tensor}"


def offloads_buffers(module: nn.Module) -> bool:
    """Whether an accelerate hook on this module brings its buffers in for each call and takes them away after it."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return False
    parts = getattr(hook, "hooks", (hook,))
    return any(getattr(part, "offload", False) and getattr(part, "offload_buffers", False) for part in parts)
