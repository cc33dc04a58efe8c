"""Whole models on a GPU: a Llama of quantized layers, eager, compiled and loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.kernels.base import FORCE_VARIABLE
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.solver import quantize_tensor

pytestmark = pytest.mark.gpu

NEW_TOKENS = 12
INT4: dict[str, Any] = {"codec": "int", "bits": 4, "group_size": 64, "transforms": ["rotate"]}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized_llama(families: dict[str, Callable[[], Any]]) -> Any:
    """The tiny Llama with every linear layer of its blocks quantized."""
    model = families["llama"]()
    for parent in model.model.layers.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, QuantLinear.from_tensor(quantize_tensor(child.weight, INT4), bias))
    return model.requires_grad_(False).eval()


def greedy(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)


def assert_same_text(model: Any, want_ids: Tensor, want_logits: Tensor, ids: Tensor, relative: float) -> None:
    """Logits as on the CPU; tokens too, up to the first that two logits within the tolerance compete for."""
    device = model.device
    logits = model(ids.to(device)).logits.float().cpu()
    limit = relative * float(want_logits.abs().max())
    assert bool(((logits - want_logits).abs() <= limit).all()), float((logits - want_logits).abs().max()) / limit
    got = greedy(model, ids.to(device)).cpu()
    assert got.shape == want_ids.shape
    for row, wanted in zip(got, want_ids, strict=True):
        differ = (row != wanted).nonzero().flatten()
        if len(differ):
            at = int(differ[0])
            step = model(row[None, :at].to(device)).logits[0, -1].float().cpu()
            assert abs(float(step[row[at]] - step[wanted[at]])) <= 2 * limit, f"token {at}"


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 2e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_a_llama_writes_what_it_writes_on_a_cpu(
    kernel: str, dtype: torch.dtype, relative: float, families: Any, ids: Tensor, gpu: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("BITPALETTE_TRITON_TUNE", "0")
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    model = quantized_llama(families)
    with torch.no_grad():
        want, logits = greedy(model, ids), model(ids).logits
        monkeypatch.setenv(FORCE_VARIABLE, kernel)
        model = quantized_llama(families).to(gpu).to(dtype)
        assert_same_text(model, want, logits, ids, relative)
    names = {n for m in model.modules() if isinstance(m, QuantLinear) for n in m.kernel_names.values()}
    assert names == {kernel}


def test_compiled(families: Any, ids: Tensor, gpu: torch.device, monkeypatch: Any) -> None:
    """torch.compile(fullgraph=True): the layers are single calls in the graph, so nothing changes but the rest's
    rounding, which aot_eager leaves alone."""
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    model = quantized_llama(families).to(gpu).half()
    with torch.no_grad():
        want = model(ids.to(gpu)).logits
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(ids.to(gpu)).logits, want)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = QuantLinear.from_tensor(quantize_tensor(torch.randn(512, 256) / 16, INT4))
        self.down = QuantLinear.from_tensor(quantize_tensor(torch.randn(256, 512) / 16, INT4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str, gpu: torch.device, monkeypatch: Any) -> None:
    """reduce-overhead: inductor's own CUDA graphs around the calls."""
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    block = Block().to(gpu).requires_grad_(False)
    graph = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for tokens in (1, 1, 1, 9):
            x = torch.randn(tokens, 256, device=gpu).half()
            want, got = block(x), graph(x)
            assert bool(((got - want).abs() <= 2e-3 * want.abs().max()).all()), tokens


def test_gradients_reach_the_input(gpu: torch.device, monkeypatch: Any) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    block = Block().to(gpu)
    x = torch.randn(5, 256, device=gpu, dtype=torch.float32).requires_grad_()
    block(x).square().sum().backward()
    up, down = (layer.dequantize(torch.float64).to(gpu) for layer in (block.up, block.down))
    z = x.detach().double().requires_grad_()
    (z + torch.relu(z @ up.T) @ down.T).square().sum().backward()
    assert x.grad is not None and z.grad is not None
    assert float((x.grad - z.grad).norm()) <= 1e-4 * float(z.grad.norm())


@pytest.mark.parametrize("where", ["load", "auto"])
def test_a_checkpoint(where: str, packed: Any, ids: Tensor, gpu: torch.device, monkeypatch: Any) -> None:
    """`bitpalette.load` and transformers' device_map="auto"; formats/ needs pydantic, which a GPU machine may lack."""
    pytest.importorskip("pydantic")
    from transformers import AutoModelForCausalLM

    import bitpalette
    from bitpalette.formats.manifest import write_manifest

    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    path = packed("llama").path
    write_manifest(path)
    with torch.no_grad():
        model = bitpalette.load(path)
        want, logits = greedy(model, ids), model(ids).logits
        monkeypatch.delenv(FORCE_VARIABLE)
        if where == "load":
            model = bitpalette.load(path, device=gpu)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, device_map="auto").eval()
        assert model.device.type == gpu.type
        assert_same_text(model, want, logits, ids, 2e-4)
