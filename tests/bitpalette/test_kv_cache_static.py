"""The packed cache with tensors of fixed size: what the growing one gives, from one compiled graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kv_models import EXACT, GREEDY, SMALL, hybrid, ids, logits, packed_llama, padded
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from bitpalette.kernels.kv_kernel import FORCE_VARIABLE
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_static_layer import StaticPackedLayer
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()
    return packed_llama()


def static(model: Any, plan: Any, tokens: int = 200) -> QuantizedCache:
    return QuantizedCache(model.config, plan, tokens, static=True)


MIXED = KVPlan(SMALL, {1: KVFormat(4, 16, 2, 5)}, {i: torch.linspace(-1, 1, 32).view(2, 16) for i in range(2)})


@pytest.mark.parametrize("plan", [SMALL, EXACT, MIXED, KVFormat(4, 4, 0, 0), KVFormat(8, 2, 0, 70)])
@pytest.mark.parametrize("kernel", [None, "reference"])
def test_the_same_as_a_growing_cache(plan: Any, kernel: str | None, model, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel:
        monkeypatch.setenv(FORCE_VARIABLE, kernel)
    inputs = padded(150, 70)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    growing, fixed = QuantizedCache(model.config, plan), static(model, plan)
    for step in (37, 1):
        part = tokens[:, :111] if step == 37 else tokens[:, 111:]
        a, b = (logits(model, cache, part, step, mask) for cache in (growing, fixed))
        assert torch.equal(a, b)
    fixed.reset()
    growing.reset()
    assert torch.equal(logits(model, growing, tokens, 50), logits(model, fixed, tokens, 50))


def addresses(cache: QuantizedCache) -> list[int]:
    return [t.data_ptr() for layer in cache.layers for t in (*layer.state, layer.length)]


def test_crop_select_and_reset_stay_in_place(model) -> None:
    growing, fixed = QuantizedCache(model.config, SMALL), static(model, SMALL)
    for cache in (growing, fixed):
        cache.activate_past_recording()
        logits(model, cache, ids(100), 25)
    before = addresses(fixed)
    for cache in (growing, fixed):
        logits(model, cache, ids(9, seed=1), 3)
        cache.crop(-9)
        assert int(cache.get_seq_length()) == 100
    assert torch.equal(logits(model, growing, ids(20, seed=2), 1), logits(model, fixed, ids(20, seed=2), 1))
    for cache in (growing, fixed):
        cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(logits(model, growing, ids(9, seed=3), 1), logits(model, fixed, ids(9, seed=3), 1))
    assert addresses(fixed) == before
    for cache in (growing, fixed):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 2]))
        assert cache.batch_size == 3
    assert torch.equal(logits(model, growing, ids(9, 3), 1), logits(model, fixed, ids(9, 3), 1))


def test_crop_then_continue_is_never_having_appended(model) -> None:
    plain, cropped = static(model, SMALL), static(model, SMALL)
    for cache in (plain, cropped):
        logits(model, cache, ids(100), 25)
        cache.activate_past_recording()  # transformers says so after the prompt
    logits(model, cropped, ids(9, seed=1), 3)
    cropped.crop(-9)
    assert torch.equal(logits(model, plain, ids(20, seed=2), 1), logits(model, cropped, ids(20, seed=2), 1))


def test_copies_share_nothing(model) -> None:
    first = static(model, SMALL)
    logits(model, first, ids(100), 25)
    other = copy.deepcopy(first)
    assert not set(addresses(first)) & set(addresses(other))
    right = logits(model, first, ids(9, seed=1), 1)
    assert torch.equal(logits(model, other, ids(9, seed=1), 1), right)


def test_one_graph_for_all_steps(model) -> None:
    """No graph break, one compilation, and the logits of the eager growing cache to the bit; `crop` and `reset` in
    between compile nothing anew."""
    growing, fixed = QuantizedCache(model.config, SMALL), static(model, SMALL)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for prompt in (ids(30), ids(80, seed=4)):
        for cache in (growing, fixed):
            cache.reset()
            logits(model, cache, prompt, 100)
            assert int(cache.get_seq_length()) == prompt.shape[1]
        for step in range(25):
            token = ids(1, seed=step)
            assert torch.equal(logits(compiled, fixed, token, 1), logits(model, growing, token, 1))
        assert counter.frame_count == 1


def test_a_prompt_inside_of_a_graph(model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises((KVError, torch._dynamo.exc.Unsupported), match="early_initialization"):
        logits(compiled, static(model, SMALL), ids(20), 20)
    torch._dynamo.reset()
    fixed, growing = static(model, SMALL), QuantizedCache(model.config, SMALL)
    fixed.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    error = logits(compiled, fixed, ids(40), 20) - logits(model, growing, ids(40), 20)
    assert (error.abs() <= 1e-3).all()


@pytest.mark.parametrize(("form", "padding"), [(SMALL, 7), pytest.param(EXACT, 0, marks=pytest.mark.slow)])
def test_generate_compiles_it(form: KVFormat, padding: int, model) -> None:
    """As transformers does by itself on a GPU: the prompt in eager mode, then one graph."""
    inputs = padded(30, padding)
    right = model.generate(**inputs, past_key_values=QuantizedCache(model.config, form), **GREEDY)
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    found = model.generate(**inputs, past_key_values=static(model, form), compile_config=config, **GREEDY)
    assert torch.equal(found, right)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_shared_keys_in_one_graph() -> None:
    """The layer that owns the keys appends after the last that reads them."""
    torch._dynamo.reset()
    model = hybrid("gemma3n")
    model.set_attn_implementation(NAME)
    growing, fixed = QuantizedCache(model.config, SMALL), static(model, SMALL)
    assert [layer.readers for layer in fixed.layers if isinstance(layer, StaticPackedLayer)] == [2]
    for cache in (growing, fixed):
        logits(model, cache, ids(40), 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        error = logits(compiled, fixed, ids(1, seed=step), 1) - logits(model, growing, ids(1, seed=step), 1)
        assert (error.abs() <= 1e-4).all()


@pytest.mark.slow
def test_inductor(model) -> None:
    growing, fixed = QuantizedCache(model.config, SMALL), static(model, SMALL)
    for cache in (growing, fixed):
        logits(model, cache, ids(30), 30)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(20):
        error = logits(compiled, fixed, ids(1, seed=step), 1) - logits(model, growing, ids(1, seed=step), 1)
        assert (error.abs() <= 1e-3).all()
    assert counter.frame_count == 1


def test_memory_is_allocated_at_once(model) -> None:
    cache = static(model, SMALL, 400)
    logits(model, cache, ids(20), 20)
    before = cache.nbytes
    logits(model, cache, ids(380, seed=1), 95)
    assert cache.nbytes == before and int(cache.get_seq_length()) == 400


def test_other_kinds_are_refused(model) -> None:
    with pytest.raises(KVError, match="static=False"):
        static(model, "k4v4-channel")
