"""Layers on a native kernel: transforms and weight in one call, never stale; layers that share an input."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitpalette.kernels.base import FORCE_VARIABLE, Packed
from bitpalette.kernels.input_transform import _made, input_transforms
from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.native_linear import NativeLinear
from bitpalette.kernels.registry import kernels
from bitpalette.kernels.shared_input import LinearGroup, linear_group_forward, share_input
from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import DTYPES, available_isas, cpu_module, isa_index
from bitpalette.quant.order import pack_order
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

F32, PLANES = 0, 3
IN, OUT = 96, 40
TRANSFORMS: list[tuple[str, ...]] = [(), ("rotate",), ("rotate", "order"), ("scale",), ("scale", "rotate", "order")]


class DenseKernel(NativeLinear):
    """Decoded weights in float32, by the native reference of the interface."""

    name = "dense"
    rank = 0
    canonical = False

    def __init__(self, form: int = F32, isa: str | None = None) -> None:
        super().__init__(isa)
        self.form = form

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return None

    def prepare(self, qt: QuantizedTensor) -> Packed:
        return Packed(qt.scheme, qt.shape, {"dense": get_codec(qt.scheme.codec).decode(qt), **qt.fields})

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        fields = {name: t for name, t in packed.tensors.items() if name != "dense"}
        return QuantizedTensor(packed.scheme, packed.shape, fields)

    def make_native(self, packed: Packed) -> Any:
        return cpu_module().ReferenceWeight(packed.tensors["dense"].data_ptr(), *packed.shape, self.form)


@pytest.fixture(params=[None, *available_isas()[:-1]])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DenseKernel:
    kernel = DenseKernel(isa=request.param)
    monkeypatch.setitem(kernels(), "dense", kernel)
    monkeypatch.setenv(FORCE_VARIABLE, "dense")
    return kernel


def made(
    transforms: tuple[str, ...] = (), out: int = OUT, n: int = IN, bias: bool = False, seed: int = 3, order: int = 1
) -> QuantLinear:
    """A layer whose codes hang on `seed` and whose transforms on `order`."""
    g = torch.Generator().manual_seed(seed)
    fields = dict(quantize_tensor(torch.randn(out, n, generator=g), Scheme.from_dict({"codec": "int"})).fields)
    scheme = Scheme.from_dict({"codec": "int", "transforms": list(transforms)})
    h = torch.Generator().manual_seed(order)
    if "rotate" in transforms:
        fields["signs"] = random_signs(order, n)
    if "order" in transforms:
        fields["order"] = pack_order(torch.randperm(n, generator=h))
    if "scale" in transforms:
        fields["input_scale"] = (torch.rand(n, generator=h) + 0.5).half()
    return QuantLinear.from_tensor(QuantizedTensor(scheme, (out, n), fields), torch.randn(out) if bias else None)


def expected(layer: QuantLinear, x: Tensor) -> Tensor:
    y = x.double() @ layer.dequantize().double().T
    return y if layer.bias is None else y + layer.bias.double()


def close(y: Tensor, reference: Tensor, tolerance: float = 0.0) -> bool:
    """Within the rounding of the output's dtype, of float32 sums, and of what may come on top."""
    bound = tolerance + {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[y.dtype]
    return y.shape == reference.shape and bool((y.double() - reference).norm() <= bound * reference.norm())


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward(dense: DenseKernel, transforms: tuple[str, ...], bias: bool) -> None:
    for dtype in DTYPES:
        layer = made(transforms, bias=bias).to(dtype)
        for shape in [(), (1,), (1, 1), (8,), (2, 3), (9,), (3, 7), (0,), (2, 0)]:
            x = torch.randn(*shape, IN).to(dtype)
            with torch.no_grad():
                for _ in range(2):  # the second may take the call that the first has made
                    y = layer(x)
                    assert y.dtype == dtype and close(y, expected(layer, x))
            assert close(layer(x), expected(layer, x)), "with gradients on"


@pytest.mark.parametrize("n", [1, 17, 100, 123, 576, 2062])
def test_widths(dense: DenseKernel, n: int) -> None:
    """2062 = 2 * 1031: an odd part that native code leaves to torch."""
    layer, x = made(("rotate", "order"), n=n), torch.randn(2, n)
    with torch.no_grad():
        assert close(layer(x), expected(layer, x))
        assert close(layer(x), expected(layer, x))
    assert (layer._call is None) == (n == 2062)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_every_form_of_the_input(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in available_isas():
        monkeypatch.setitem(kernels(), "dense", DenseKernel(form, isa))
        monkeypatch.setenv(FORCE_VARIABLE, "dense")
        layer, x = made(("rotate",), n=576), torch.randn(3, 576)
        with torch.no_grad():
            assert close(layer(x), expected(layer, x), 3e-4 if form == PLANES else 0.012)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
def test_a_call_is_one_allocation(dense: DenseKernel, transforms: tuple[str, ...]) -> None:
    layer, x = made(transforms, bias=True), torch.randn(1, 1, IN)
    group = LinearGroup([layer, made(transforms, seed=4)])
    with torch.inference_mode():
        layer(x)
        group(x)
        with Counted() as counted:
            layer(x)
        assert counted.calls == ["aten.empty_like.default"]
        with Counted() as counted:
            group(x)
        assert counted.calls == ["aten.empty_like.default"] * 2


@torch.no_grad()
def test_a_call_follows_its_layer(dense: DenseKernel) -> None:
    layer, x = made(("rotate", "order"), bias=True), torch.randn(1, IN)
    other = made(("rotate", "order"), bias=True, seed=8, order=9)

    def check() -> None:
        for _ in range(2):
            assert close(layer(x), expected(layer, x))

    check()
    layer.load_state_dict(other.state_dict())
    check()
    assert torch.equal(layer(x), other(x))
    layer.weight_signs = random_signs(77, IN)
    check()
    layer.bias.copy_(torch.randn(OUT))
    check()
    layer.bias.data = torch.randn(OUT)
    check()
    layer.bias.data = torch.randn(2 * OUT)[::2]
    check()
    layer.bias = nn.Parameter(torch.randn(OUT))
    check()
    layer.bias.data = layer.bias.data.half()
    check()
    layer.bias = None
    check()
    layer._fill("weight", other.to_tensor())
    check()
    layer.unprepare()
    check()
    x = x.bfloat16()
    check()


@torch.no_grad()
def test_inputs_unlike_the_last(dense: DenseKernel) -> None:
    layer = made(("rotate",))
    wide = torch.randn(4, 2 * IN)
    for x in (torch.randn(4, IN), wide[:, :IN], wide[:, ::2], torch.randn(IN, 4).T, nn.Parameter(torch.randn(4, IN))):
        assert close(layer(x), expected(layer, x))
    layer(torch.randn(1, IN))
    with pytest.raises(ValueError, match="96 features in"):
        layer(torch.randn(1, IN + 1))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(1, IN).double())
    assert layer(torch.empty(2, IN, device="meta")).shape == (2, OUT)


def test_copies_have_calls_of_their_own(dense: DenseKernel) -> None:
    layer, x = made(("rotate", "order")), torch.randn(1, IN)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        assert twin._call is None and torch.equal(twin(x), y)
        layer.load_state_dict(made(("rotate", "order"), seed=5).state_dict())
        assert torch.equal(twin(x), y) and not torch.equal(layer(x), y)


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_gradients(dense: DenseKernel, transforms: tuple[str, ...], tokens: int) -> None:
    layer = made(transforms, bias=True)
    with torch.no_grad():
        layer(torch.randn(tokens, IN))
    x, weigh = torch.randn(tokens, IN, requires_grad=True), torch.randn(tokens, OUT)
    (layer(x) * weigh).sum().backward()
    assert torch.allclose(x.grad, weigh @ layer.dequantize(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.bias.grad, weigh.sum(0), atol=1e-4)
    layer.bias.grad = None
    (layer(x.detach()) * weigh).sum().backward()
    assert torch.allclose(layer.bias.grad, weigh.sum(0), atol=1e-4)


def test_equal_transforms_are_one_object() -> None:
    isa, names = isa_index("scalar"), ("rotate", "order")

    def of(seed: int, order: int, n: int = 40) -> Any:
        g = torch.Generator().manual_seed(order)
        fields = {"signs": random_signs(seed, n), "order": pack_order(torch.randperm(n, generator=g))}
        return input_transforms(names, fields, n, isa)

    first = of(1, 1)
    assert of(1, 1).native is first.native
    others = [of(2, 1), of(1, 2), of(1, 1, 41)]
    assert len({id(t.native) for t in [first, *others]}) == 4
    before = len(_made)
    del first, others
    gc.collect()
    assert len(_made) == before - 4


def test_what_stays_in_torch() -> None:
    assert input_transforms(("rotate",), {"signs": random_signs(0, 8)}, 8, None).native is None
    wide = input_transforms(("rotate",), {"signs": random_signs(0, 2062)}, 2062, 0)
    assert wide.native is None and "2062 columns" in str(wide.why_not)
    other = input_transforms(("fold",), {}, 8, 0)
    assert other.native is None and "'fold' has no native form" in str(other.why_not)


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
def test_a_group_is_its_layers(dense: DenseKernel, transforms: tuple[str, ...]) -> None:
    layers = [made(transforms, out=out, bias=out == 17, seed=out) for out in (40, 17, 1)]
    assert share_input(layers) is None
    group = LinearGroup(layers)
    for dtype in DTYPES:
        for layer in layers:
            layer.to(dtype)
        for shape in [(IN,), (1, 1, IN), (8, IN), (9, IN), (0, IN), (2, 3, IN)]:
            x = torch.randn(shape).to(dtype)
            with torch.no_grad():
                one_by_one = [layer(x) for layer in layers]
                for ys in (group(x), group(x), linear_group_forward(layers, x)):
                    assert all(torch.equal(y, single) for y, single in zip(ys, one_by_one, strict=True))
    x = torch.randn(2, IN, requires_grad=True)
    for layer in layers:
        layer.float()
    sum(y.sum() for y in group(x)).backward()
    total = sum(layer.dequantize().sum(0) for layer in layers)
    assert torch.allclose(x.grad, total.expand(2, -1), rtol=1e-4, atol=1e-4)
    assert torch.allclose(layers[1].bias.grad, torch.full((17,), 2.0))


@torch.no_grad()
def test_a_group_follows_its_layers(dense: DenseKernel) -> None:
    layers = [made(("rotate",), seed=seed, bias=True) for seed in (1, 2)]
    group, x = LinearGroup(layers), torch.randn(1, IN)

    def check() -> None:
        for _ in range(2):
            assert all(torch.equal(y, layer(x)) for y, layer in zip(group(x), layers, strict=True))
            assert all(close(y, expected(layer, x)) for y, layer in zip(group(x), layers, strict=True))

    check()
    layers[1].load_state_dict(made(("rotate",), seed=7, bias=True).state_dict())
    check()
    layers[1].bias.data = torch.randn(OUT)
    check()
    layers[0].weight_signs = random_signs(50, IN)  # the two no longer share a transform
    check()
    x = x[:, :1].expand(1, IN)
    check()


def test_why_layers_cannot_share(dense: DenseKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(("rotate",))
    assert share_input([]) == "there are no layers"
    for other, reason in (
        (nn.Linear(IN, 3), "layer 1: it is a Linear"),
        (made(("rotate",), n=64), "layer 1 takes 64 features in, layer 0 takes 96"),
        (made(), "layer 1 transforms its input in another way than layer 0"),
        (made(("rotate",), order=2), "layer 1 transforms its input in another way than layer 0"),
    ):
        assert share_input([layer, other]) == reason
        with pytest.raises(ValueError, match="cannot share their input: layer 1"):
            linear_group_forward([layer, other], torch.randn(1, IN))
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert share_input([made()]) == "layer 0: its kernel reference is not native"
