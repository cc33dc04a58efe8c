"""Quantized layers in graphs: a Llama by torch.compile(fullgraph=True), gradients, copies, blocks of one shape."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.torch_ops import key_of
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor

ROTATED = {"codec": "int", "bits": 4, "group_size": 32, "transforms": ["rotate"]}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(out: int = 40, n: int = 96, bias: bool = True) -> QuantLinear:
    qt = quantize_tensor(torch.randn(out, n), Scheme.from_dict(ROTATED))
    return QuantLinear.from_tensor(qt, torch.randn(out) if bias else None)


def compiled(f: Any, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = layer(64, 32), layer(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("prepared", [False, True])
def test_compiled_llama(packed: Any, ids: Tensor, prepared: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed("llama").path).eval()
    kinds = {type(m) for m in model.modules()}
    assert {QuantLinear, QuantEmbedding} <= kinds
    with torch.no_grad():
        if prepared:
            expected = model(ids).logits
        logits = compiled(model)(ids).logits
        assert torch.equal(logits, expected if prepared else model(ids).logits)


@pytest.mark.slow
def test_compiled_llama_by_inductor(packed: Any, ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed("llama").path).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert (compiled(model, "inductor")(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    grads = []
    for f in (block, compiled(block)):
        x = torch.linspace(-1, 1, 3 * 5 * 32).view(3, 5, 32).to(dtype).requires_grad_()
        block.up.bias.grad = None
        f(x).square().sum().backward()
        grads.append((x.grad, block.up.bias.grad))
        assert x.grad.dtype == block.up.bias.grad.dtype == dtype
    for eager, graph in zip(*grads, strict=True):
        assert bool(eager.any()) and (eager - graph).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * eager.norm()


def test_the_op_keeps_its_contract() -> None:
    """Schema, fake implementation and autograd registration, as torch checks them."""
    linear, embedding = (
        layer(),
        QuantEmbedding.from_tensor(quantize_tensor(torch.randn(9, 32), Scheme.from_dict(ROTATED))),
    )
    x = torch.randn(2, 3, 96, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.bitpalette.linear.default, (x, linear.bias, linear._key, 40), test_utils=checks)
    grad = torch.randn(2, 3, 40)
    torch.library.opcheck(torch.ops.bitpalette.linear_backward.default, (grad, linear._key, 96), test_utils=checks)
    ids = torch.tensor([[1, 8]])
    arguments = (ids, embedding._key, 32, embedding.dtype)
    torch.library.opcheck(torch.ops.bitpalette.embedding.default, arguments, test_utils=checks)


def test_blocks_of_one_shape_share_a_graph_and_not_their_weights() -> None:
    blocks = [Block().requires_grad_(False) for _ in range(12)]
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(block: Block, x: Tensor) -> Tensor:
        return block(x)

    f = torch.compile(run, fullgraph=True, backend=backend)
    x = torch.randn(2, 32)
    with torch.no_grad():
        for block in blocks:
            assert torch.equal(f(block, x), block(x))
    assert graphs == 1


def test_a_graph_follows_its_layer() -> None:
    block, x = Block().requires_grad_(False), torch.randn(2, 32)
    f = compiled(block)
    other = Block()
    with torch.no_grad():
        assert torch.equal(f(x), block(x))
        block.load_state_dict(other.state_dict())
        assert torch.equal(f(x), other(x))
        block.up.unprepare()
        assert torch.equal(f(x), other(x))
        block.up.bias.copy_(torch.randn(64))
        assert torch.equal(f(x), block(x))


def test_copies_and_pickles_have_keys_of_their_own() -> None:
    block, x = Block().requires_grad_(False), torch.randn(2, 32)
    stored = io.BytesIO()
    torch.save(block, stored)
    stored.seek(0)
    with torch.no_grad():
        y = compiled(block)(x)
        for twin in (copy.deepcopy(block), torch.load(stored, weights_only=False), copy.deepcopy(compiled(block))):
            first = twin.up if isinstance(twin, Block) else twin._orig_mod.up
            assert int(first._key) != int(block.up._key)
            f = compiled(twin) if isinstance(twin, Block) else twin
            assert torch.equal(f(x), y)
            first.bias.add_(1.0)
            assert torch.equal(f(x), (twin if isinstance(twin, Block) else twin._orig_mod)(x))
            assert torch.equal(compiled(block)(x), y)


def test_tied_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            qt = quantize_tensor(torch.randn(48, 32), Scheme.from_dict(ROTATED))
            self.embed, self.head = QuantEmbedding.from_tensor(qt), QuantLinear.from_tensor(qt)
            self.head.tie(self.embed)

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.embed(ids))

    model, ids = Tied(), torch.tensor([[1, 47, 3]])
    with torch.no_grad():
        assert torch.equal(compiled(model)(ids), model(ids))


def test_other_lengths_of_the_input() -> None:
    linear = layer().requires_grad_(False)
    f = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (1, 2, 17, 40):
            x = torch.randn(tokens, 96)
            assert torch.equal(f(x), linear(x))


def test_export() -> None:
    linear, x = layer().requires_grad_(False), torch.randn(2, 96)
    with torch.no_grad():
        linear(x)
        for strict in (False, True):
            assert torch.equal(torch.export.export(linear, (x,), strict=strict).module()(x), linear(x))


def test_a_layer_that_is_gone_is_named() -> None:
    linear, x = layer(), torch.randn(1, 96)
    key = linear._key
    del linear
    gc.collect()
    with pytest.raises(RuntimeError, match=f"key {int(key)}\\) that is gone"):
        torch.ops.bitpalette.linear(x, None, key, 40)


def test_keys_are_made_on_the_cpu_for_good() -> None:
    with torch.device("meta"), torch.inference_mode():
        key = key_of(nn.Identity())
    assert key.device.type == "cpu" and not key.is_inference()
