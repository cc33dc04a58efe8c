"""A linear layer that computes from packed bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.transform import get_transform
from .embedding import QuantEmbedding
from .frozen import frozen_linear
from .module import QuantModule, buffer_name


class QuantLinear(QuantModule):
    """y = x W^T + bias with W [out_features, in_features] quantized. In place of nn.Linear.

    Buffers: `weight` (codes) and `weight_<field>` for every other field of the scheme. Empty until loaded; see
    `from_tensor`. Takes float32, float16 or bfloat16 with any leading dimensions; gives the dtype of x. W is frozen;
    gradients reach x and the bias.
    """

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
        if self.tied_to is None:
            super().prepare()
        else:
            self.tied_to.prepare()

    def to_tensor(self) -> QuantizedTensor:
        """The weight in canonical layout."""
        return self._owner._canonical("weight")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] in its own basis, transforms undone."""
        return self.to_tensor().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] for x [..., in_features]; zero tokens give zero tokens, a meta x gives a meta y."""
        if self.tied_to is not None:
            return self._tied_forward(x, self.tied_to)
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._compute(x, self)

    def _compute(self, x: Tensor, owner: QuantModule) -> Tensor:
        kernel, packed = owner._ready("weight")
        transforms = self._schemes["weight"].transforms
        if transforms:
            fields = owner._transform_fields("weight")
            for name in transforms:
                x = get_transform(name).apply_input(x, fields)
        return frozen_linear(x, kernel, packed, self._parameters["bias"])

    def _tied_forward(self, x: Tensor, embedding: QuantEmbedding) -> Tensor:
        """As `forward`, on the embedding's device, with the embedding's weights brought in where they are offloaded."""
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        hook = getattr(embedding, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(embedding)
        try:
            device = embedding._tensors("weight")[0].device
            return self._compute(x.to(device), embedding).to(x.device)
        finally:
            if hook is not None:
                hook.post_forward(embedding, None)

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
