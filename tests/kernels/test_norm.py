"""The norm between a rotated residual stream and a head that is tied to rotated embeddings."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitpalette.kernels.norm import RotatedNorm
from bitpalette.quant.rotate import TRANSFORM, random_signs


def made(cls: Any, size: int) -> tuple[nn.Module, RotatedNorm]:
    torch.manual_seed(0)
    norm = cls(size)
    nn.init.normal_(norm.weight)
    rotated = RotatedNorm(copy.deepcopy(norm))
    return norm, rotated


def rotate(x: torch.Tensor) -> torch.Tensor:
    return TRANSFORM.apply_input(x, {"signs": random_signs(4, x.shape[-1])})


@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("size", [1, 17, 72, 576])
def test_is_the_norm_in_the_rotated_basis(cls: Any, size: int) -> None:
    norm, rotated = made(cls, size)
    x = torch.randn(3, 5, size)
    assert torch.allclose(rotated(rotate(x)), rotate(norm(x)), atol=1e-4)
    offset = 1.0 if cls is GemmaRMSNorm else 0.0
    assert torch.allclose(rotated.gain(), norm.weight + offset, atol=1e-5)
    assert torch.equal(rotated.unit_weight(), torch.full((size,), 1 - offset))
    table = torch.randn(9, size)
    want = norm(x) @ table.T
    plain = copy.deepcopy(norm)
    plain.weight.data.copy_(rotated.unit_weight())
    assert torch.allclose(plain(rotate(x)) @ rotated.head(rotate(table)).T, want, atol=1e-3)


def test_bfloat16_is_computed_in_float32() -> None:
    norm, rotated = made(LlamaRMSNorm, 72)
    x = torch.randn(4, 72).bfloat16()
    y = rotated.to(torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    norm.weight.data = norm.weight.data.bfloat16().float()
    exact = rotate(norm(TRANSFORM.undo_weight(x, {"signs": random_signs(4, 72)})))
    assert float((y.float() - exact).abs().max().detach()) <= 2**-8 * float(exact.abs().max().detach())


def test_state_copies_and_pickles() -> None:
    _, rotated = made(LlamaRMSNorm, 40)
    assert set(rotated.state_dict()) == {"weight"}
    x = torch.randn(2, 40)
    for other in (copy.deepcopy(rotated), pickle.loads(pickle.dumps(rotated))):
        assert torch.equal(other(x), rotated(x))
        other.weight.data.zero_()
        assert not bool(other(x).any()) and bool(rotated(x).any())
    assert rotated.to("meta")(x.to("meta")).shape == x.shape


def test_gradients_reach_input_and_gain() -> None:
    _, rotated = made(LlamaRMSNorm, 24)
    x = torch.randn(2, 24, requires_grad=True)
    rotated(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.any()) and bool(rotated.weight.grad.any())


def test_other_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="LayerNorm cannot be rotated"):
        RotatedNorm(nn.LayerNorm(8))
