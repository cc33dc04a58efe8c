"""QuantExperts against the float experts of transformers, whose weights are set to the decoded ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitpalette.kernels.experts import QuantExperts
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, stack

transformers = pytest.importorskip("transformers")

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 5, 64, 96, 2
INT4 = {"codec": "int", "bits": 4, "group_size": 32}
SCHEMES = [
    (INT4, {"codec": "int", "bits": 3}),
    (INT4, None),
    (None, {**INT4, "symmetric": False, "transforms": ["rotate"]}),
    ({**INT4, "transforms": ["rotate"]}, {"codec": "lut"}),
]


def float_experts(kind: str) -> nn.Module:
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

        config = MixtralConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
        made = MixtralExperts(config)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

        config = Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE)
        made = Qwen3MoeExperts(config)
    config._experts_implementation = "eager"
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def quantized(w: torch.Tensor, values: dict) -> QuantizedTensor:
    return stack([quantize_tensor(part, Scheme.from_dict(values), seed=e) for e, part in enumerate(w)])


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights, index = torch.topk(torch.rand(tokens, EXPERTS).softmax(-1), TOP_K)
    return torch.randn(tokens, HIDDEN), index, weights


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("gate_up", "down"), SCHEMES)
def test_against_the_float_module(kind: str, gate_up: dict | None, down: dict | None) -> None:
    torch.manual_seed(1)
    reference = float_experts(kind)
    weights = {}
    for name, values in (("gate_up_proj", gate_up), ("down_proj", down)):
        if values is not None:
            weights[name] = quantized(getattr(reference, name).detach(), values)
            getattr(reference, name).data = weights[name].dequantize()
    experts = QuantExperts.from_module(reference, weights)
    names = {name if f == "codes" else f"{name}_{f}" for name, qt in weights.items() for f in qt.fields}
    names |= {name for name in ("gate_up_proj", "down_proj") if name not in weights}
    assert set(experts.state_dict()) == names
    for tokens in (1, 7, 40, 0):
        call = routed(tokens)
        with torch.no_grad():
            y, expected = experts(*call), reference(*call)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        assert (y - expected).norm() <= 0.03 * expected.norm()
    assert set(experts.state_dict()) == names
    for name, qt in weights.items():
        back = experts.to_tensor(name)
        assert all(torch.equal(back.fields[f], qt.fields[f]) for f in qt.fields)
    twin, call = copy.deepcopy(experts), routed(3)
    assert torch.equal(twin(*call), experts(*call))
    assert experts.bfloat16()(call[0].bfloat16(), *call[1:]).dtype == torch.bfloat16


def test_gradients_and_slots_of_no_expert() -> None:
    torch.manual_seed(2)
    reference = float_experts("mixtral")
    weights = {name: quantized(getattr(reference, name).detach(), INT4) for name in ("gate_up_proj", "down_proj")}
    for name, qt in weights.items():
        getattr(reference, name).data = qt.dequantize()
    experts = QuantExperts.from_module(reference, weights)
    x, index, route = routed(6)
    index[0, 1] = EXPERTS  # a slot that another rank serves
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    experts(ours, index, route).square().sum().backward()
    reference(theirs, index, route).square().sum().backward()
    assert (ours.grad - theirs.grad).norm() <= 0.05 * theirs.grad.norm()


def test_modules_that_compute_something_else() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    module = GptOssExperts(GptOssConfig(num_local_experts=2, hidden_size=8, intermediate_size=8))
    with pytest.raises(ValueError, match="GptOssExperts cannot run as QuantExperts"):
        QuantExperts.from_module(module, {})
    with pytest.raises(ValueError, match="no three-dimensional gate_up_proj"):
        QuantExperts.from_module(nn.Linear(2, 2), {})
