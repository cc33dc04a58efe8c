"""Layers on the CUDA kernels, from Python to device code and back, on the host executor: no GPU.

bitpalette._cuda's own source is compiled by g++ with the executor (tests/hostexec) in place of a device, and tensors of
the CPU stand for those of a GPU. One build of every kernel, more than a minute of two cores: these tests are `slow`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch

from bitpalette.kernels import cuda_tiles, native_cuda
from bitpalette.kernels.base import KernelError, choose
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.codec import get_codec
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats

pytestmark = [pytest.mark.hostexec, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
SCHEMES: list[dict[str, Any]] = [
    {"codec": "int", "bits": 4, "group_size": 64, "transforms": ["rotate"]},
    {"codec": "int", "bits": 4, "group_size": 32, "symmetric": False, "transforms": ["scale"]},
    {"codec": "int", "bits": 8},
    {"codec": "int", "bits": 3, "group_size": 128},
    {"codec": "int", "bits": 4, "group_size": 64, "symmetric": False, "progressive": True, "transforms": ["rotate"]},
    {"codec": "lut", "entries": 8, "transforms": ["rotate"]},
    {"codec": "lut", "table": "nf4", "group_size": 64},
    {"codec": "float", "element": "e4m3"},
    {"codec": "trellis", "rate": 2.5, "window": 12, "transforms": ["rotate", "order"]},
]


@pytest.fixture(scope="module")
def twin(hostexec: Any) -> Any:
    """bitpalette._cuda, its device the host executor."""
    sources = [*sorted((ROOT / "csrc/bind").glob("cuda_*.cpp")), *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    path = hostexec.build_path(sources, "plain", includes=includes)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def on_the_twin(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "_cuda", twin)
    for module in (native_cuda, cuda_tiles):
        monkeypatch.setattr(module, "why_not_device", lambda device: None)
    monkeypatch.setattr(native_cuda, "PART_WORDS", 1 << 20)  # of workspace: the executor runs one block at a time
    for kept in ("_of_stream", "_spare", "_shared"):
        monkeypatch.setattr(native_cuda, kept, {})
    monkeypatch.setenv("BITPALETTE_KERNEL", "cuda")


def layer_of(values: dict[str, Any], out: int = 136, n: int = 576, bias: bool = True) -> QuantLinear:
    torch.manual_seed(out + n)
    z = torch.randn(64, n) * torch.linspace(0.2, 3, n)
    stats = Stats(z.T @ z / len(z), z.abs().mean(0), len(z)) if "transforms" in values else None
    qt = quantize_tensor(torch.randn(out, n) / n**0.5, Scheme.from_dict(values), stats=stats)
    return QuantLinear.from_tensor(qt, torch.randn(out) if bias else None)


def error(layer: QuantLinear, x: torch.Tensor) -> float:
    """Of the layer's result, relative to its norm, against the dequantized weight in float64."""
    with torch.no_grad():
        want = x.double() @ layer.dequantize(torch.float64).T + (0 if layer.bias is None else layer.bias.double())
        y = layer(x)
    assert y.shape == want.shape and y.dtype == x.dtype
    return float((y.double() - want).norm() / want.norm())


def decoded(layer: QuantLinear) -> torch.Tensor:
    """The weight as the codec stores it, transforms not undone."""
    qt = layer.to_tensor()
    return get_codec(qt.scheme.codec).decode(qt)


@pytest.mark.parametrize("values", SCHEMES, ids=str)
def test_a_layer_computes_what_its_weight_says(values: dict[str, Any]) -> None:
    layer = layer_of(values)
    layer.prepare()
    assert layer.kernel_names == {"weight": "cuda"}
    int8 = 0.012 if values.get("progressive") else 0.0  # activations of 8 bits
    for dtype, shape in [
        (torch.float16, (1, 576)),
        (torch.bfloat16, (2, 3, 576)),
        (torch.float16, (70, 576)),
        (torch.bfloat16, (300, 576)),  # dequantized, then torch
        (torch.float32, (5, 576)),
    ]:
        assert error(layer, torch.randn(shape).to(dtype)) <= TOLERANCE[dtype] + int8


def test_int8_and_exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = ["rotate"]
    trellis = {"codec": "trellis", "rate": 3.0, "window": 12, "transforms": rotated}
    grouped = {"codec": "int", "bits": 4, "group_size": 64, "transforms": rotated}
    x = torch.randn(2, 576).half()
    monkeypatch.setenv(cuda_tiles.ACTIVATIONS_VARIABLE, "int8")
    for values in (trellis, grouped, {**grouped, "group_size": 0}, {**grouped, "bits": 8, "group_size": 0}):
        assert 1e-3 <= error(layer_of(values), x) <= 0.015
    monkeypatch.setenv(cuda_tiles.ACTIVATIONS_VARIABLE, "exact")
    assert error(layer_of(trellis), x) <= 6e-4
    monkeypatch.setenv(cuda_tiles.ACTIVATIONS_VARIABLE, "4bit")
    with pytest.raises(KernelError, match="4bit is no form"):
        layer_of(trellis)(x)


@pytest.mark.parametrize(("out", "n"), [(1, 8), (17, 123), (64, 190), (200, 1537)])
def test_awkward_shapes(out: int, n: int) -> None:
    for values in ({"codec": "int", "bits": 4}, {"codec": "trellis", "rate": 2.0, "window": 12}):
        for dtype in (torch.float16, torch.bfloat16):
            assert error(layer_of(values, out, n), torch.randn(9, n).to(dtype)) <= TOLERANCE[dtype]


def test_rows_and_back_to_the_file() -> None:
    for values in SCHEMES:
        layer = layer_of(values)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        kernel, packed = layer._ready("weight")
        index = torch.tensor([135, 0, 64, 64])
        assert torch.equal(kernel.rows(packed, index), decoded(layer)[index])
        after = layer.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        with pytest.raises(RuntimeError, match="outside the weight"):
            kernel.rows(packed, torch.tensor([136]))


def test_gradients_reach_the_input() -> None:
    layer = layer_of(SCHEMES[0])
    x = torch.randn(3, 576, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    want = layer.dequantize(torch.float64).sum(0).expand(3, -1)
    assert float((x.grad - want).norm()) <= 1e-4 * float(want.norm())


def test_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_tiles.INVARIANT_VARIABLE, "1")
    layer = layer_of({"codec": "int", "bits": 4, "group_size": 64})
    x = torch.randn(100, 576).half()
    with torch.no_grad():
        whole = layer(x)
        assert all(torch.equal(layer(x[:count]), whole[:count]) for count in (1, 9, 64))


def test_workspace_that_is_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "PART_WORDS", 100)
    with pytest.raises(KernelError, match=r"words and \d+ counters of workspace, there are 100"):
        layer_of({"codec": "int", "bits": 4})(torch.randn(1, 576).half())


def test_what_it_refuses() -> None:
    int4 = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 192})
    with pytest.raises(KernelError, match="a power of two, not 192"):
        choose(int4, (64, 576), CPU)
    with pytest.raises(KernelError, match=r"2, 3, 4, 8 bits, not 5"):
        choose(Scheme.from_dict({"codec": "int", "bits": 5}), (64, 576), CPU)
