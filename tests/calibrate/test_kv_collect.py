"""What is seen while text runs through a model, and that the model does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from bitpalette.calibrate.kv_collect import MOST_SINKS, Attended, KeyStatistics, observing, query_positions, run

TOKENS = torch.randint(4, 90, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral"])
@torch.no_grad()
def test_keys_are_those_of_the_cache_and_logits_stay(name: str, families: Any) -> None:
    model = families[name]()
    before, implementation = model(input_ids=TOKENS).logits, model.config._attn_implementation
    cache = DynamicCache()
    model(input_ids=TOKENS, past_key_values=cache)
    seen: dict[int, Attended] = {}
    with observing(model, lambda one: seen.__setitem__(one.layer, one), "bitpalette"):
        out = model(input_ids=TOKENS, use_cache=False).logits
    assert model.config._attn_implementation == implementation
    assert (out - before).abs().max() <= 1e-4
    layers: list[Any] = cache.layers
    assert sorted(seen) == list(range(len(layers)))
    for i, layer in enumerate(layers):
        assert (seen[i].key - layer.keys).abs().max() <= 1e-5
        assert (seen[i].value - layer.values).abs().max() <= 1e-5
        assert seen[i].query.shape[0] == 2 and seen[i].query.shape[2] == 40


@torch.no_grad()
def test_an_observer_may_answer(families: Any) -> None:
    model = families["llama"]()

    def nothing(seen: Attended) -> Tensor:
        return torch.zeros_like(seen.query).transpose(1, 2).contiguous()

    with observing(model, nothing):
        silent = model(input_ids=TOKENS).logits
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    assert (model(input_ids=TOKENS).logits - silent).abs().max() <= 1e-5


def test_the_model_is_as_before_after_an_error(families: Any) -> None:
    model = families["llama"]()
    implementation = model.config._attn_implementation

    def fail(seen: Attended) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), observing(model, fail):
        model(input_ids=TOKENS)
    assert model.config._attn_implementation == implementation
    model(input_ids=TOKENS)


@torch.no_grad()
def test_means_and_mass(families: Any) -> None:
    model = families["llama"]()
    cache = DynamicCache()
    model(input_ids=TOKENS, past_key_values=cache)
    statistics = KeyStatistics(frozenset([1]), queries=5)
    steps = []
    with observing(model, statistics):
        run(model, {40: TOKENS}, lambda: steps.append(1))
    assert len(steps) == 2
    means = statistics.means()
    assert list(means) == [1]
    layer: Any = cache.layers[1]
    assert (means[1] - layer.keys[:, :, MOST_SINKS:].mean((0, 2))).abs().max() <= 1e-5
    assert statistics.widths() == {1: (layer.keys.shape[-1], layer.values.shape[-1])}
    model.set_attn_implementation("eager")
    attention = model(input_ids=TOKENS, output_attentions=True).attentions[1]
    expected = attention[:, :, query_positions(40, MOST_SINKS, 5), :MOST_SINKS].mean((0, 1, 2))
    assert (torch.tensor(statistics.sink_mass()) - expected).abs().max() <= 1e-5
    assert expected.sum() > 0.1


@torch.no_grad()
def test_no_means_where_scores_are_not_shift_invariant(families: Any) -> None:
    statistics = KeyStatistics(frozenset([0, 1]))
    model = families["gemma2"]()  # with a soft cap
    with observing(model, statistics, "bitpalette"):
        run(model, {40: TOKENS})
    assert set(statistics.widths()) == {0, 1}
    assert statistics.means() == {}


def test_query_positions() -> None:
    assert query_positions(40, 16, 4).tolist() == [21, 27, 33, 39]
    assert query_positions(10, 8, 64).tolist() == [8, 9]
    assert query_positions(10, 30, 64).tolist() == [9]
    assert len(set(query_positions(2048, 69, 64).tolist())) == 64
