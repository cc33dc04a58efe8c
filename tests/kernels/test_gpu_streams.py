"""The same bits every time on a GPU: from run to run, on streams side by side, in CUDA graphs, on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels import native_cuda
from bitpalette.kernels.base import FORCE_VARIABLE
from bitpalette.kernels.cuda_tiles import ACTIVATIONS_VARIABLE, INVARIANT_VARIABLE
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.trellis import TrellisScheme

pytestmark = pytest.mark.gpu

REPEATS = 100
SPLIT = (1000, 4096)
"""16 rows of 64 superblocks: every row's columns are shared out among several blocks."""

SOME = [
    (IntScheme(bits=4, group_size=128), "16bit"),
    (IntScheme(bits=3, group_size=32, symmetric=False), "16bit"),
    (LutScheme(entries=16, group_size=128), "16bit"),
    (TrellisScheme(rate=2.5), "16bit"),
    (IntScheme(bits=4, group_size=128), "int8"),
    (IntScheme(bits=4, group_size=64, progressive=True), "int8"),
    (TrellisScheme(rate=3), "int8"),
    (TrellisScheme(rate=2), "exact"),
]
each_kind = pytest.mark.parametrize(("scheme", "form"), SOME, ids=str)


@each_kind
def test_a_hundred_runs(
    cuda_kernel: Any, scheme: Scheme, form: str, gpu_weight: Callable[..., Any], gpu: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    weight = gpu_weight(cuda_kernel, scheme, SPLIT)
    for tokens in (1, 2, 17, 129):
        x = torch.randn(tokens, SPLIT[1], device=gpu).half()
        first = weight(x)
        different = torch.zeros((), dtype=torch.int64, device=gpu)
        for _ in range(REPEATS):
            different += (weight(x).view(torch.int16) != first.view(torch.int16)).sum()
        assert int(different) == 0, tokens


def test_a_hundred_runs_of_triton(gpu: torch.device, gpu_weight: Callable[..., Any], monkeypatch: Any) -> None:
    from bitpalette.kernels.registry import kernels

    monkeypatch.setenv("BITPALETTE_TRITON_TUNE", "0")
    weight = gpu_weight(kernels()["triton"], SOME[0][0], SPLIT)
    x = torch.randn(3, SPLIT[1], device=gpu).half()
    first = weight(x)
    assert all(torch.equal(weight(x), first) for _ in range(REPEATS))


@each_kind
def test_two_streams_at_once(
    cuda_kernel: Any, scheme: Scheme, form: str, gpu_weight: Callable[..., Any], gpu: Any, monkeypatch: Any
) -> None:
    """Each has workspace of its own: kernels that overlap leave each other's sums and counters alone."""
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    weights = [gpu_weight(cuda_kernel, scheme, shape) for shape in (SPLIT, (577, 4096))]
    inputs = [torch.randn(tokens, 4096, device=gpu).half() for tokens in (2, 1)]
    want = [weight(x) for weight, x in zip(weights, inputs, strict=True)]
    torch.cuda.synchronize(gpu)
    streams = [torch.cuda.Stream(gpu) for _ in range(2)]
    got: list[list[Tensor]] = [[], []]
    for _ in range(REPEATS):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(weights[i](inputs[i]))
    torch.cuda.synchronize(gpu)
    handles = {stream.cuda_stream for stream in streams}
    spaces = {s.parts.data_ptr() for (_, handle), s in native_cuda._of_stream.items() if handle in handles}
    assert len(spaces) == 2
    for i in range(2):
        assert all(torch.equal(y, want[i]) for y in got[i]), i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["16bit", "int8"])
def test_batch_invariant(
    cuda_kernel: Any, form: str, dtype: torch.dtype, gpu_weight: Callable[..., Any], gpu: Any, monkeypatch: Any
) -> None:
    """BITPALETTE_BATCH_INVARIANT=1: a token's bits do not depend on the tokens beside it."""
    monkeypatch.setenv(INVARIANT_VARIABLE, "1")
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    for scheme in (IntScheme(bits=4, group_size=64), IntScheme(bits=4)):
        weight = gpu_weight(cuda_kernel, scheme, (577, 4096))
        x = torch.randn(256, 4096, device=gpu).to(dtype)
        whole = weight(x)
        for tokens in (1, 2, 8, 9, 16, 33, 64, 65, 129):
            assert torch.equal(weight(x[:tokens]), whole[:tokens]), (str(scheme), tokens)
            assert torch.equal(weight(x[-tokens:]), whole[-tokens:]), (str(scheme), tokens)


# -- layers in CUDA graphs


def layer_on(
    device: torch.device, values: dict[str, Any], out: int = 577, n: int = 1536, seed: int = 0, bias: bool = True
) -> QuantLinear:
    torch.manual_seed(seed)
    qt = quantize_tensor(torch.randn(out, n), values)
    return QuantLinear.from_tensor(qt, torch.randn(out) if bias else None).to(device).requires_grad_(False)


LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"codec": "int", "bits": 4, "group_size": 128}, "16bit"),
    ({"codec": "int", "bits": 4, "group_size": 64, "transforms": ["rotate"]}, "int8"),
    ({"codec": "int", "bits": 4, "group_size": 64, "progressive": True}, "16bit"),
    ({"codec": "trellis", "rate": 2.0, "window": 12, "transforms": ["rotate"]}, "exact"),
    ({"codec": "lut", "entries": 8, "group_size": 64}, "16bit"),
]


def captured(run: Callable[[], Tensor], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph and the tensor it writes. What is forbidden in a capture, cudaMalloc too, makes it fail."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = run()
    return graph, y


@pytest.mark.parametrize("tokens", [1, 2, 17, 300])
@pytest.mark.parametrize(("values", "form"), LAYERS, ids=str)
def test_a_graph_replays_what_eager_computes(
    cuda_kernel: Any, values: dict[str, Any], form: str, tokens: int, gpu: torch.device, monkeypatch: Any
) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    layer = layer_on(gpu, values)
    static = torch.randn(tokens, 1536, device=gpu).half()
    layer(static)
    graph, y = captured(lambda: layer(static))
    held = None
    for seed in range(5):
        torch.manual_seed(seed)
        static.copy_(torch.randn(tokens, 1536, device=gpu))
        want = layer(static)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize(gpu)
        assert torch.equal(y, want), seed
        allocated = torch.cuda.memory_allocated(gpu)
        assert held in (None, allocated)  # a replay allocates nothing
        held = allocated


@pytest.mark.parametrize(("values", "form"), LAYERS, ids=str)
def test_capture_on_a_stream_that_was_never_used(
    cuda_kernel: Any, values: dict[str, Any], form: str, gpu: torch.device, monkeypatch: Any
) -> None:
    """No call of this layer with so many tokens before, none of any layer on that stream."""
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    native_cuda._of_stream.clear()
    native_cuda._spare.clear()
    layer = layer_on(gpu, values)
    layer(torch.randn(40, 1536, device=gpu).half())  # on the default stream, by another plan
    static = torch.randn(1, 1536, device=gpu).half()
    graph, y = captured(lambda: layer(static), torch.cuda.Stream(gpu))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(gpu)
    assert torch.equal(y, layer(static))


@pytest.mark.parametrize("n", [1536, 1600])  # 1600 = 25 * 64: a Hartley matrix that no layer had before
def test_a_new_layer_in_a_capture(cuda_kernel: Any, n: int, gpu: torch.device, monkeypatch: Any) -> None:
    """Prepared, but never called: what its first call sets up is allowed while a stream is captured."""
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    layer_on(gpu, LAYERS[0][0])(torch.randn(1, 1536, device=gpu).half())  # some layer ran on this device
    layer = layer_on(gpu, LAYERS[0][0] if n == 1536 else LAYERS[1][0], n=n, seed=1)
    layer.prepare()
    static = torch.randn(9, n, device=gpu).half()
    graph, y = captured(lambda: layer(static))
    graph.replay()
    torch.cuda.synchronize(gpu)
    assert torch.equal(y, layer(static))


def test_two_graphs_of_several_layers(cuda_kernel: Any, gpu: torch.device, monkeypatch: Any) -> None:
    """Graphs share a stream's workspace: replayed in turn, and eager calls between, each gives its own result."""
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    layers = [layer_on(gpu, LAYERS[0][0], out=1536, seed=seed, bias=False) for seed in range(4)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.nn.functional.rms_norm(layer(x), (1536,))
        return x

    inputs = [torch.randn(tokens, 1536, device=gpu).half() for tokens in (1, 33)]
    want = [run(x) for x in inputs]
    graphs = [captured(lambda x=x: run(x)) for x in inputs]
    for _ in range(20):
        for (graph, y), x, w in zip(graphs, inputs, want, strict=True):
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(run(x), w)
            assert torch.equal(y, w)


# -- devices


def test_another_device_than_the_current_one(cuda_kernel: Any, gpu: torch.device, monkeypatch: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    second = torch.device("cuda", 1)
    x = torch.randn(9, 1536).half()
    for values, _ in LAYERS:
        want = layer_on(gpu, values)(x.to(gpu)).cpu()
        assert torch.cuda.current_device() == 0
        got = layer_on(second, values)(x.to(second))
        assert got.device == second and torch.cuda.current_device() == 0
        assert torch.equal(got.cpu(), want)


def test_a_layer_that_moves(cuda_kernel: Any, gpu: torch.device, monkeypatch: Any) -> None:
    """To the GPU, to the CPU and back: the fields stay the same, bit for bit, and so does the result."""
    layer = layer_on(gpu, LAYERS[0][0])
    x = torch.randn(3, 1536).half()
    first = layer(x.to(gpu)).cpu()
    assert layer.kernel_names == {"weight": "cuda"}
    fields = {name: t.cpu().clone() for name, t in layer.state_dict().items()}
    layer.to("cpu")
    assert layer(x).shape == first.shape
    layer.to(gpu)
    assert torch.equal(layer(x.to(gpu)).cpu(), first)
    assert all(torch.equal(t.cpu(), fields[name]) for name, t in layer.state_dict().items())
