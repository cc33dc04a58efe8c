"""Layers that read the same input (q, k and v; gate and up) by one native call.

The input is transformed once, brought once into the form that their kernels read, and all their rows are one parallel
region. Layers cannot know their siblings: whoever loads a model makes the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, empty_like, get_num_threads, is_grad_enabled
from torch.compiler import is_compiling

from ..quant.native import DTYPES, cpu_module
from .base import Packed
from .linear import QuantLinear
from .native_call import NativeWeight, Watched, are_there, like_of


def share_input(layers: Sequence[QuantLinear]) -> str | None:
    """None where one call can run these layers, prepared, on the same input; else the reason in words."""
    weights = _weights(layers)
    return weights if isinstance(weights, str) else None


def linear_group_forward(layers: Sequence[QuantLinear], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], sharing the work on x [..., in]. ValueError where `share_input` has a reason.

    For a group that is called again and again, keep a `LinearGroup`.
    """
    return LinearGroup(layers)(x)


class LinearGroup:
    """Layers that share their input, and the call for the shape they were last given.

    It holds the layers and nothing of theirs: they may be moved, loaded and offloaded as ever.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        """ValueError where the layers cannot share an input."""
        self.layers = tuple(layers)
        self._call: _GroupCall | None = None
        reason = share_input(self.layers)
        if reason is not None:
            raise ValueError(f"these layers cannot share their input: {reason}")

    def __call__(self, x: Tensor) -> list[Tensor]:
        """[layer(x) for layer in layers]: [..., out of the layer] for x [..., in], of the dtypes that layers take.

        Inputs of many tokens, gradients, and layers that were moved to where they share nothing take the layers' own
        way, one after another.
        """
        if is_compiling():
            return [layer(x) for layer in self.layers]
        call = self._call
        if call is None or x.shape != call.shape or x.dtype is not call.dtype or not are_there(call.watched):
            call = self._call = _group_call(self.layers, x)
        if (
            call is None
            or type(x) is not Tensor
            or not x.is_cpu
            or not x.is_contiguous()
            or any(bias.data_ptr() != at for bias, at in call.biases)
            or (is_grad_enabled() and (x.requires_grad or any(bias.requires_grad for bias, _ in call.biases)))
        ):
            return [layer(x) for layer in self.layers]
        ys = [empty_like(like) for like in call.like]
        call.run(x.data_ptr(), call.number, call.tokens, call.bias_at, [y.data_ptr() for y in ys], get_num_threads())
        return ys


class _GroupCall(NamedTuple):
    """As NativeCall, for several weights."""

    shape: torch.Size
    dtype: torch.dtype
    number: int
    tokens: int
    run: Callable[..., None]  # LinearCall.run_group
    like: list[Tensor]
    watched: tuple[Watched, ...]
    biases: list[tuple[Tensor, int]]  # those there are, with their addresses
    bias_at: list[int]
    packed: list[Packed]


def _group_call(layers: Sequence[QuantLinear], x: Tensor) -> _GroupCall | None:
    weights = _weights(layers)
    if isinstance(weights, str) or any(w.why_not(x) is not None for w in weights):
        return None
    first = weights[0]
    native = [w.kernel.native(w.packed) for w in weights]
    run = cpu_module().LinearCall(native, first.kernel.resolve_isa(), first.transform).run_group
    like = [like_of((*x.shape[:-1], w.packed.shape[0]), x.dtype) for w in weights]
    biases = [(w.bias, w.bias.data_ptr()) for w in weights if w.bias is not None]
    at = [0 if w.bias is None else w.bias.data_ptr() for w in weights]
    watched = tuple(watched for w in weights for watched in w.watched)
    tokens = x.numel() // first.packed.shape[1]
    packed, number = [w.packed for w in weights], DTYPES[x.dtype]
    return _GroupCall(x.shape, x.dtype, number, tokens, run, like, watched, biases, at, packed)


def _weights(layers: Sequence[QuantLinear]) -> list[NativeWeight] | str:
    """What the layers compute with, prepared; or why they cannot share an input, in words."""
    weights: list[NativeWeight] = []
    for number, layer in enumerate(layers):
        weight = layer.native_weight() if isinstance(layer, QuantLinear) else f"it is a {type(layer).__name__}"
        if isinstance(weight, str):
            return f"layer {number}: {weight}"
        weights.append(weight)
        first = weights[0]
        if weight.packed.shape[1] != first.packed.shape[1]:
            return f"layer {number} takes {weight.packed.shape[1]} features in, layer 0 takes {first.packed.shape[1]}"
        if weight.transform is not first.transform:
            return f"layer {number} transforms its input in another way than layer 0"
        if weight.kernel.resolve_isa() != first.kernel.resolve_isa():
            return f"layer {number} runs with another instruction set than layer 0"
    return weights or "there are no layers"
