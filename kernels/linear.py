"""A linear layer that computes from packed bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, empty_like, get_num_threads, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from . import torch_ops
from .base import Kernel, Packed
from .embedding import QuantEmbedding
from .frozen import frozen_linear, input_gradient
from .input_transform import InputTransforms, transforms_of
from .module import QuantModule, buffer_name
from .native_call import NativeCall, NativeWeight, Watched, are_there, native_call
from .native_linear import NativeLinear


class QuantLinear(QuantModule):
    """y = x W^T + bias with W [out_features, in_features] quantized. In place of nn.Linear.

    Buffers: `weight` (codes) and `weight_<field>` for every other field of the scheme. Empty until loaded; see
    `from_tensor`. Takes float32, float16 or bfloat16 with any leading dimensions; gives the dtype of x. W is frozen;
    gradients reach x and the bias.
    """

    _call: NativeCall | None  # for inputs like the last one
    _transforms: tuple[tuple[str, int | None], InputTransforms] | None  # with the kernel and instruction set

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._forget()
        self._declare("weight", scheme, (out_features, in_features), device)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_tensor(cls, qt: QuantizedTensor, bias: Tensor | None = None) -> QuantLinear:
        """A layer that holds the fields of a two-dimensional qt (no copy) and the bias [out_features]."""
        layer = cls(qt.shape[1], qt.shape[0], False, qt.scheme, device="meta")
        layer._fill("weight", qt)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    @property
    def scheme(self) -> Scheme:
        return self._schemes["weight"]

    @property
    def tied_to(self) -> QuantEmbedding | None:
        return self.__dict__.get("_tied")

    def tie(self, embedding: QuantEmbedding) -> None:
        """Compute from the embedding's weight from now on: stored once, prepared once, for both.

        The layer drops its own buffers and has no weight in its state_dict; the embedding's state is the weight.
        """
        if embedding.scheme != self.scheme or embedding._shapes["weight"] != self._shapes["weight"]:
            raise ValueError(
                f"cannot tie {self.scheme} {list(self._shapes['weight'])} to an embedding of {embedding.scheme} "
                f"{list(embedding._shapes['weight'])}: the two must be the same weight"
            )
        self.unprepare()
        for tensor_name in [name for name in self._buffers if name.startswith("weight")]:
            del self._buffers[tensor_name]
        embedding.serve_linear()
        self.__dict__["_tied"] = embedding  # past nn.Module: the embedding is no submodule of this layer

    @property
    def _owner(self) -> QuantModule:
        return self.tied_to or self

    def prepare(self) -> None:
        """And the transforms of the input: on a GPU their matrices are copied there, which a capture forbids."""
        if self.tied_to is None:
            super().prepare()
        else:
            self.tied_to.prepare()
        self._map(self._owner)

    def to_tensor(self) -> QuantizedTensor:
        """The weight in canonical layout."""
        return self._owner._canonical("weight")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] in its own basis, transforms undone."""
        return self.to_tensor().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] for x [..., in_features]; zero tokens give zero tokens, a meta x gives a meta y."""
        if is_dynamo_compiling():
            return torch_ops.linear(x, self._parameters["bias"], self._key, self.out_features)
        call = self._call
        if call is not None:  # a decode step comes by hundreds of times, and each test here costs 20 to 200 ns
            shape, dtype, number, tokens, run, like, watched, bias, at, _ = call
            if (
                x.shape == shape
                and x.dtype is dtype
                and type(x) is Tensor
                and x.is_cpu
                and x.is_contiguous()
                and are_there(watched)
                and (bias is None or bias.data_ptr() == at)
                and not (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            ):
                y = empty_like(like)
                run(x.data_ptr(), number, tokens, at, y.data_ptr(), get_num_threads())
                return y
        return self.compute(x, self._parameters["bias"])

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, never in a graph, with that bias in place of the layer's."""
        if is_compiling():  # torch.export without dynamo
            return torch_ops.linear(x, bias, self._key, self.out_features)
        if self.tied_to is not None:
            return self._tied_forward(x, bias, self.tied_to)
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        weight = self.native_weight()
        if isinstance(weight, NativeWeight):
            self._call = native_call(weight, x)
        return frozen_linear(x, *self._map(self), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of x [..., in_features] from that of y [..., out_features], in its dtype."""
        kernel, packed, transforms = self._map(self._owner)
        z = input_gradient(grad.reshape(-1, self.out_features), kernel, packed, transforms)
        return z.view(*grad.shape[:-1], self.in_features)

    def native_weight(self) -> NativeWeight | str:
        """What native calls compute with, prepared; or why there is none, in words."""
        if self.tied_to is not None:
            return "it is tied to an embedding"
        kernel, packed, transforms = self._map(self)
        if not isinstance(kernel, NativeLinear):
            return f"its kernel {kernel.name} is not native"
        if transforms.why_not is not None:
            return transforms.why_not
        codes = (self._packed_names("weight") or ["weight"])[0]
        names = [codes, *(buffer_name("weight", field) for field in self._transform_names["weight"])]
        watched: list[Watched] = [(self._buffers, name, self._buffers[name]) for name in names]
        bias = self._parameters["bias"]
        return NativeWeight(kernel, packed, transforms.native, (*watched, (self._parameters, "bias", bias)), bias)

    def _map(self, owner: QuantModule) -> tuple[Kernel, Packed, InputTransforms]:
        """All that the linear map is made of."""
        kernel, packed = owner._ready("weight")
        fields = owner._transform_fields("weight")
        made_for = kernel.name, kernel.resolve_isa() if isinstance(kernel, NativeLinear) else None
        if self._transforms is not None:
            known_for, known = self._transforms
            if known_for == made_for and all(known.fields.get(name) is tensor for name, tensor in fields.items()):
                return kernel, packed, known
        made = transforms_of(kernel, self._schemes["weight"].transforms, fields, self.in_features)
        self._transforms = made_for, made
        return kernel, packed, made

    def _tied_forward(self, x: Tensor, bias: Tensor | None, embedding: QuantEmbedding) -> Tensor:
        """As `forward`, on the embedding's device, with the embedding's weights brought in where they are offloaded."""
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        hook = getattr(embedding, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(embedding)
        try:
            device = embedding._tensors("weight")[0].device
            return frozen_linear(x.to(device), *self._map(embedding), bias).to(x.device)
        finally:
            if hook is not None:
                hook.post_forward(embedding, None)

    def unprepare(self) -> None:
        self._forget()
        super().unprepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self._call = self._transforms = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_call": None, "_transforms": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.tied_to is not None:
            # a file may repeat the tied weight under the head's name; the embedding's is the one that counts
            names = {prefix + buffer_name("weight", field) for field in self.to_tensor().fields}
            state_dict = {k: v for k, v in state_dict.items() if k not in names}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_tied") is not None and name.startswith("weight") and isinstance(value, Tensor):
            return  # transformers' tie_weights sets the embedding's tensor here: it is already the one in use
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        tied = self.__dict__.get("_tied")
        if tied is not None and name.startswith("weight"):
            return getattr(tied, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        tied = ", tied" if self.tied_to is not None else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.scheme}{tied}"
