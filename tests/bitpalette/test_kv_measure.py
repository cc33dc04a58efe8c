"""One forward in which attention reads packed pages in chunks is the model run in chunks with a packed cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_load import packed_layers
from bitpalette.kv_measure import KLMeasure
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "initializer_range": 0.15,
}
DENSE, SMALL = KVFormat(16, 16, 2, 6), KVFormat(3, 2, 2, 6)
TOKENS = torch.randint(4, 90, (2, 50), generator=torch.Generator().manual_seed(1))
FIRST, STEP = 20, 10


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


def gemma() -> Any:
    """With sliding windows in between."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=types)
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


def chunked(model: Any, plan: KVPlan) -> Tensor:
    """[rows] mean KL of the positions from FIRST on."""
    found = []
    for row in TOKENS:
        exact = model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        implementation = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        cache = QuantizedCache(model.config, plan)
        parts = [model(input_ids=part, past_key_values=cache).logits[0] for part in row[None].split(STEP, 1)]
        model.set_attn_implementation(implementation)
        packed = torch.cat(parts).log_softmax(-1)
        found.append((exact.exp() * (exact - packed)).sum(-1)[FIRST:].mean())
    return torch.stack(found)


@pytest.mark.parametrize("build", [llama, gemma])
@pytest.mark.parametrize("pairs", [{1: (3, 2)}, {2: (2, 16)}, {1: (16, 3), 2: (4, 4)}])
def test_as_in_chunks(build: Any, pairs: dict[int, tuple[int, int]]) -> None:
    model = build()
    layers = packed_layers(model.config)
    means = {layer: torch.full((2, 16), 0.3) for layer in layers}
    plan = KVPlan(DENSE, {n: KVFormat(*p, sinks=2, window=6) for n, p in pairs.items()}, means)
    measure = KLMeasure(model, TOKENS, layers, FIRST, STEP)
    found, expected = measure(plan), float(chunked(model, plan).mean())
    assert found == pytest.approx(expected, rel=0.02)
    assert expected > 1e-5
    assert model.config._attn_implementation != NAME
    with_every_block = KLMeasure(model, TOKENS, layers, FIRST, STEP)
    with_every_block.skips = False
    assert with_every_block(plan) == pytest.approx(found, rel=1e-3)


def test_blocks_before_the_first_packed_one_do_not_run() -> None:
    model = llama()
    measure = KLMeasure(model, TOKENS[:1], [0, 1, 2], FIRST, STEP)
    runs: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda module, args, i=i: runs.append(i))
    assert measure(KVPlan(DENSE, {1: SMALL})) > 0
    assert runs == [1, 2]
    assert list(model.model.layers) == [block for _, block in measure.blocks]


def test_dense_plans_cost_nothing() -> None:
    assert KLMeasure(llama(), TOKENS[:1], [0, 1, 2], FIRST)(KVPlan(DENSE)) == 0


def test_sequences_that_read_nothing_packed() -> None:
    with pytest.raises(KVError, match="give more than 50"):
        KLMeasure(llama(), TOKENS[:1], [0, 1, 2], 50)
