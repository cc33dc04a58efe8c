"""QuantLinear as a module: forward, gradients, state, copies, moves, ties."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.kernels import linear as module_of_linear
from bitpalette.kernels.base import FORCE_VARIABLE, KernelError
from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.registry import kernels
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, field_specs

SCHEMES = [
    {"codec": "int", "bits": 4, "group_size": 32},
    {"codec": "int", "bits": 4, "group_size": 32, "symmetric": False, "transforms": ["rotate"]},
    {"codec": "int", "bits": 3},
    {"codec": "lut"},
]
IN, OUT = 96, 40


def quantized(values: dict, out: int = OUT, n: int = IN) -> QuantizedTensor:
    torch.manual_seed(3)
    return quantize_tensor(torch.randn(out, n), Scheme.from_dict(values))


def layer(values: dict, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_tensor(quantized(values), torch.randn(OUT) if bias else None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def error(y: Tensor, reference: Tensor) -> float:
    return float(((y - reference).float().norm() / reference.float().norm()).detach())


@pytest.fixture(params=SCHEMES, ids=lambda values: str(Scheme.from_dict(values)))
def values(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0), (5, 1, 7)])
def test_forward(values: dict, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    linear = layer(values)
    x = torch.randn(*shape, IN).to(dtype)
    with torch.no_grad():
        y = linear(x)
    assert y.shape == (*shape, OUT) and y.dtype == dtype
    if y.numel():
        assert error(y, x.float() @ linear.dequantize().T + linear.bias) <= 0.03


def test_inputs_that_are_not_contiguous(values: dict) -> None:
    linear, x = layer(values), torch.randn(IN, 6).T
    assert torch.equal(linear(x), linear(x.contiguous()))


def test_wrong_width_is_refused(values: dict) -> None:
    with pytest.raises((ValueError, RuntimeError), match=str(IN)):
        layer(values)(torch.randn(2, IN + 1))


@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_gradients_reach_the_input_and_the_bias(values: dict, tokens: int) -> None:
    linear = layer(values)
    x = torch.randn(tokens, IN, requires_grad=True)
    weigh = torch.randn(tokens, OUT)
    (linear(x) * weigh).sum().backward()
    assert x.grad is not None and linear.bias.grad is not None
    reference = weigh @ linear.dequantize()
    assert x.grad.shape == x.shape and torch.allclose(x.grad, reference, rtol=1e-4, atol=1e-4)
    assert torch.allclose(linear.bias.grad, weigh.sum(0), atol=1e-4)


def test_other_activation_dtypes_are_refused(values: dict) -> None:
    with pytest.raises(TypeError, match="float64"):
        layer(values)(torch.randn(2, IN, dtype=torch.float64))


def test_state_is_canonical_before_and_after_prepare(values: dict) -> None:
    linear, qt = layer(values), quantized(values)
    names = {"weight" if field == "codes" else f"weight_{field}": field for field in qt.fields}
    before = copy.deepcopy(linear.state_dict())
    assert set(before) == {*names, "bias"}
    linear.prepare()
    after = linear.state_dict()
    assert same(before, after)
    assert all(torch.equal(after[name], qt.fields[field]) for name, field in names.items())
    assert torch.equal(linear.weight, qt.fields["codes"]) and torch.equal(linear.weight_scale, qt.fields["scale"])
    linear.unprepare()
    assert linear.kernel_names == {} and same(before, linear.state_dict())


def test_prepare_leaves_one_copy_in_memory(values: dict) -> None:
    linear = QuantLinear.from_tensor(quantized(values, 64, 128))
    canonical = sum(b.numel() * b.element_size() for b in linear.buffers())
    linear.prepare()
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    assert held <= canonical * 1.1  # cpu_int keeps zero points as bytes
    if not kernels()[linear.kernel_names["weight"]].canonical:
        assert "weight" not in dict(linear.named_buffers())


def test_prepare_makes_the_transforms(values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call makes none: on a GPU it may be one that is captured."""
    linear = layer(values)
    tied = QuantLinear(IN, OUT, False, linear.scheme)
    tied.tie(QuantEmbedding.from_tensor(quantized(values)))
    for prepared in (linear, tied):
        prepared.prepare()
    monkeypatch.setattr(module_of_linear, "transforms_of", lambda *args: pytest.fail("made at the first call"))
    assert linear(torch.randn(2, IN)).shape == tied(torch.randn(2, IN)).shape == (2, OUT)


def test_load_state_dict_into_a_prepared_layer(values: dict) -> None:
    target = layer(values)
    torch.manual_seed(9)
    other = quantize_tensor(torch.randn(OUT, IN), Scheme.from_dict(values))
    source = QuantLinear.from_tensor(other, torch.randn(OUT))
    x = torch.randn(2, IN)
    target(x)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_copies_and_pickles(values: dict) -> None:
    linear, x = layer(values), torch.randn(3, IN)
    y = linear(x)
    names = linear.kernel_names
    stored = io.BytesIO()
    torch.save(linear, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(linear), torch.load(stored, weights_only=False)):
        assert twin.kernel_names == {}  # free of this machine until it runs
        assert same(dict(twin.state_dict()), dict(linear.state_dict()))
        assert torch.equal(twin(x), y)
        assert twin.kernel_names == names
    assert linear.kernel_names == names and torch.equal(linear(x), y)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("prepared", [False, True])
def test_casts_reach_the_bias_alone(values: dict, cast: str, prepared: bool) -> None:
    linear = layer(values)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    if prepared:
        linear.prepare()
    getattr(nn.Sequential(linear), cast)()
    after = linear.state_dict()
    assert after.pop("bias").dtype == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))
    del before["bias"]
    assert same(before, after)


def test_meta_construction_and_loading(values: dict) -> None:
    source = layer(values)
    with torch.device("meta"):
        empty = QuantLinear(IN, OUT, True, Scheme.from_dict(values))
    assert all(t.is_meta for t in empty.state_dict().values())
    assert empty(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    with pytest.raises(KernelError, match="meta device"):
        empty(torch.randn(2, IN))
    made = copy.deepcopy(empty).to_empty(device="cpu")
    made.load_state_dict(source.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(made(x), source(x))
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(x), source(x))


def test_moving_to_another_device_goes_through_the_canonical_layout(values: dict) -> None:
    linear = layer(values)
    linear.prepare()
    canonical = {k: (v.shape, v.dtype) for k, v in linear.state_dict().items()}
    linear.to("meta")
    assert linear.kernel_names == {}
    assert {k: (v.shape, v.dtype) for k, v in linear.state_dict().items()} == canonical


def test_forced_kernel(values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    linear, x = layer(values), torch.randn(2, IN)
    y = linear(x)
    assert linear.kernel_names == {"weight": "reference"}
    assert error(y, x @ linear.dequantize().T + linear.bias) <= 1e-5


def test_fields_must_match() -> None:
    linear = QuantLinear(IN, OUT, False, IntScheme(bits=4, group_size=32))
    specs = field_specs(linear.scheme, (OUT, IN))
    assert {name: (tuple(b.shape), b.dtype) for name, b in linear.named_buffers()} == {
        "weight": specs["codes"],
        "weight_scale": specs["scale"],
    }
    with pytest.raises(SchemeError, match="got int bits=3"):
        linear._fill("weight", quantized({"codec": "int", "bits": 3}))
    assert "scheme=int group_size=32" in repr(linear)


class TiedModel(nn.Module):
    def __init__(self, values: dict) -> None:
        super().__init__()
        self.embed = QuantEmbedding.from_tensor(quantized(values))
        self.head = QuantLinear.from_tensor(quantized(values))
        self.head.tie(self.embed)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.embed(ids))


def test_tied_head(values: dict) -> None:
    model, ids = TiedModel(values), torch.tensor([[1, 5, 39]])
    alone = QuantEmbedding.from_tensor(quantized(values))
    y = model(ids)
    assert torch.equal(model.embed(ids), alone(ids))
    assert error(y, alone(ids) @ alone.dequantize().T) <= 0.03
    assert not list(model.head.buffers()) and model.head.kernel_names == {}
    assert torch.equal(model.head.dequantize(), alone.dequantize())
    assert all(name.startswith("embed.") for name in model.state_dict())
    twin = copy.deepcopy(model)
    assert twin.head.tied_to is twin.embed and torch.equal(twin(ids), y)
    assert torch.equal(model.head.weight, alone.weight)
    model.head.weight = model.embed.weight  # as transformers' tie_weights does
    assert not list(model.head.buffers()) and "weight" not in model.head.__dict__
    state = model.state_dict()
    model.load_state_dict({**state, "head.weight": state["embed.weight"]})
    assert torch.equal(model(ids), y)
    model.half()
    assert model(ids).dtype == torch.float16
    assert error(model(ids), y) <= 0.03


def test_tie_refuses_another_weight() -> None:
    embed = QuantEmbedding.from_tensor(quantized(SCHEMES[0], 48))
    with pytest.raises(ValueError, match="cannot tie"):
        layer(SCHEMES[0], False).tie(embed)
