"""Norms that rotate, inside a transformers model: put there before loading, taken out again by `dequantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .formats.errors import FormatError
from .kernels.linear import QuantLinear
from .kernels.norm import RotatedNorm


def rotate_norms(model: nn.Module, gains: Sequence[str]) -> None:
    """Put a RotatedNorm in the place of every norm with one of these gains (names of parameters).

    FormatError where the model has no such norm.
    """
    for gain in gains:
        module_name = gain.rpartition(".")[0]
        try:
            norm = model.get_submodule(module_name)
            rotated = RotatedNorm(norm)
        except (AttributeError, ValueError) as error:
            raise FormatError(f"rotated norm {gain!r}: {error}; config.json and the model disagree") from error
        model.set_submodule(module_name, rotated.train(norm.training))


def norms_of(model: nn.Module) -> dict[str, RotatedNorm]:
    """{module name: norm} of those in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RotatedNorm)}


def plain_head(model: Any) -> Tensor | None:
    """The head's weight for a norm that does not rotate and has gain 1, float32 [out, hidden_size]; None where nothing
    rotates. FormatError for a model without its head."""
    norms = norms_of(model)
    if not norms:
        return None
    head = model.get_output_embeddings()
    if head is None or len(norms) != 1:
        raise FormatError(f"{type(model).__name__} lacks the head that its rotated norm is for; load the model with it")
    weight = head.dequantize() if isinstance(head, QuantLinear) else head.weight.detach().float()
    return next(iter(norms.values())).head(weight)


def restore_norms(model: nn.Module, norms: Mapping[str, RotatedNorm], fresh: nn.Module, dtype: torch.dtype) -> None:
    """Put the norms of `fresh`, the same architecture on the meta device, with gain 1, in the place of rotated ones."""
    for name, rotated in norms.items():
        original = fresh.get_submodule(name)
        original.weight = loaded_parameter(rotated.unit_weight().to(dtype))
        model.set_submodule(name, original.train(rotated.training))


def loaded_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter marked as transformers marks loaded ones, so that it does not initialise them."""
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter
