"""Quantized layers as torch operators, for graphs: `torch.compile` sees one opaque call for a layer.

    bitpalette::linear(x, bias?, key, out_features) -> y             differentiable in x and bias
    bitpalette::linear_backward(grad, key, in_features) -> grad of x
    bitpalette::embedding(ids, key, embedding_dim, dtype) -> rows

`key` is a 0-dimensional int64 tensor, an attribute of the layer, that names it among the live ones. It is a tensor and
no number so that it is an input of the graph: a number would be compiled in, and a block compiled once for all layers
of a model would then run every one with the first one's weights, or be compiled anew for each. The weights themselves
stay with the layer, which prepares, moves and copies them as ever behind the graph's back. A copy or an unpickled layer
has a key of its own. A graph that outlives its layer, or its process, names the key that is gone.

Eager mode pays for none of this: layers call their kernel, and come here only while they are being compiled.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_live: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def key_of(layer: Any) -> Tensor:
    """A new key for a layer, which lives as long as the layer does."""
    number = next(_numbers)
    _live[number] = layer
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")  # by name: a model may be built on the meta device


def _layer(key: Tensor) -> Any:
    layer = _live.get(int(key))
    if layer is None:
        raise RuntimeError(f"the compiled graph runs a quantized layer (key {int(key)}) that is gone: compile it anew")
    return layer


@torch.library.custom_op(
    "bitpalette::linear", mutates_args=(), schema="(Tensor x, Tensor? bias, Tensor key, int out_features) -> Tensor"
)
def linear(x: Tensor, bias: Tensor | None, key: Tensor, out_features: int) -> Tensor:
    """y [..., out_features] = T(x) W^T + bias for the layer of `key`; as `QuantLinear.forward`."""
    with torch.no_grad():
        return _layer(key).compute(x, bias)


@linear.register_fake
def _(x: Tensor, bias: Tensor | None, key: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op(
    "bitpalette::linear_backward", mutates_args=(), schema="(Tensor grad, Tensor key, int in_features) -> Tensor"
)
def linear_backward(grad: Tensor, key: Tensor, in_features: int) -> Tensor:
    """The gradient of x [..., in_features] from that of y."""
    with torch.no_grad():
        return _layer(key).input_gradient(grad)


@linear_backward.register_fake
def _(grad: Tensor, key: Tensor, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, key, _ = inputs
    ctx.save_for_backward(key)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    [key] = ctx.saved_tensors
    grad_x = linear_backward(grad, key, ctx.in_features) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_bias, None, None


linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(
    "bitpalette::embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor key, int embedding_dim, ScalarType dtype) -> Tensor",
)
def embedding(ids: Tensor, key: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows [..., embedding_dim] of the table of `key`; as `QuantEmbedding.forward`."""
    return _layer(key).look_up(ids)


@embedding.register_fake
def _(ids: Tensor, key: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((*ids.shape, embedding_dim), dtype=dtype, device=ids.device)
