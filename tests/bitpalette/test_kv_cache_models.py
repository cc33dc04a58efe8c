"""The packed cache in models of every kind: with 16-bit pages, greedy tokens are those of transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_models import EXACT, GREEDY, HYBRIDS, SMALL, check_generates, hybrid, ids, llama, logits, padded
from transformers import DynamicCache, Gemma3nForCausalLM, Gemma4ForCausalLM

from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.quant.kv_format import KVError, KVFormat

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]
"""Of tests/conftest.py, less those without a layer to pack (mistral, gemma3), without keys and values in their cache
(deepseek_v2), with attention of their own (falcon) and without a cache (bert): refused, see test_kv_cache.py."""


@pytest.mark.parametrize("static", [0, 100])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_the_dense_cache(name: str, static: int, families) -> None:
    check_generates(families[name](), padded(30, 7), static=static)


def test_every_family_is_here_or_refused(families) -> None:
    refused = set(families) - set(FAMILIES) - {"bert"}
    assert refused == {"mistral", "gemma3", "deepseek_v2", "falcon"}
    for name in refused - {"falcon"}:
        with pytest.raises(KVError, match="use transformers' DynamicCache"):
            QuantizedCache(families[name]().config, "k4v4")


@pytest.mark.parametrize("static", [0, 140])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models(name: str, static: int) -> None:
    """Windows, chunks, linear attention, shared keys, softcaps, logits of sinks, keys wider than values; a prompt that
    is packed at once and one that waits."""
    model = hybrid(name)
    for length, padding in ((30, 12), (90, 0)):
        check_generates(model, padded(length, padding), static=static)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("form", [EXACT, SMALL])
def test_shared_keys_are_read_from_their_owner(name: str, form: KVFormat) -> None:
    """Step by step or at once, `crop` in between: the same as transformers' cache where pages are exact, and nearly the
    same with few bits as exact pages have."""
    model = hybrid(name)
    tokens = ids(120)
    right = logits(model, DynamicCache(config=model.config), tokens, 7)
    model.set_attn_implementation(NAME)
    cache = QuantizedCache(model.config, form)
    owners = [layer for layer in cache.packed if layer.readers == 2]
    assert len(owners) == 1 and len(cache.packed) == 1
    found = logits(model, cache, tokens[:, :84], 7)
    error = (found - right[:, :84]).abs()
    assert (error <= 1e-3).all() if form is EXACT else 1e-3 < float(error.mean()) < float(right.abs().mean())
    if form is EXACT:
        cache.activate_past_recording()
        logits(model, cache, ids(9, seed=3), 3)
        cache.crop(-9)
        rest = logits(model, cache, tokens[:, 84:], 7)
        assert ((rest - right[:, 84:]).abs() <= 1e-3).all()


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_reader_that_lost_the_keys_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers moves shared keys between devices, which takes the layer from behind them."""
    model = hybrid(name)
    model.set_attn_implementation(NAME)
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def moved(self: Any, *args: Any, shared_kv_states: Any, **kwargs: Any) -> Any:
        if self.is_kv_shared_layer:
            shared_kv_states = {k: tuple(t.clone() for t in v) for k, v in shared_kv_states.items()}
        return forward(self, *args, shared_kv_states=shared_kv_states, **kwargs)

    monkeypatch.setattr(attention, "forward", moved)
    assert isinstance(model, (Gemma3nForCausalLM, Gemma4ForCausalLM))
    for static in (False, True):
        cache = QuantizedCache(model.config, SMALL, 64 * static, static=static)
        with pytest.raises(KVError, match="of 2 attentions"):
            logits(model, cache, ids(20), 10)


@pytest.mark.parametrize("static", [0, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (16, 1), (32, 2), (8, 2)])
def test_groups_of_heads(heads: int, kv_heads: int, static: int) -> None:
    """1 to 16 query heads for one of keys, one head of keys for all among them."""
    model = llama(1, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    check_generates(model, padded(30, 7), static=static, max_new_tokens=20)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_widths_of_heads(width: int) -> None:
    """16-bit pages give the dense cache's tokens; with 8 bits the native kernels and torch's reference are close to it,
    growing caches and static ones."""
    model = llama(1, head_dim=width, num_attention_heads=2, num_key_value_heads=1)
    for static in (0, 64):
        check_generates(model, padded(30, 7), static=static, max_new_tokens=20)
    tokens = ids(60)
    right = logits(model, DynamicCache(config=model.config), tokens, 6)
    model.set_attn_implementation(NAME)
    for static in (0, 64):
        cache = QuantizedCache(model.config, KVFormat(8, 8, 2, 4), static, static=static > 0)
        error = logits(model, cache, tokens, 6) - right
        assert (error.square().mean() <= 1e-3 * right.square().mean()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", [0, 150])
def test_models_in_16_bits(dtype: torch.dtype, static: int) -> None:
    """Pages, window and results have the model's dtype; no further from float32 than transformers' cache is."""
    model = llama()
    tokens = ids(150)
    right = logits(model, DynamicCache(config=model.config), tokens, 10)
    model = model.to(dtype)
    dense = (logits(model, DynamicCache(config=model.config), tokens, 10).float() - right).square().mean()
    model.set_attn_implementation(NAME)
    for form in (EXACT, KVFormat(8, 8, 4, 8)):
        cache = QuantizedCache(model.config, form, static, static=static > 0)
        found = logits(model, cache, tokens, 10)
        assert found.dtype == dtype
        assert ((found.float() - right).square().mean() <= 1.5 * dense + 1e-3 * right.square().mean()).all()
        layer = cache.layers[0]
        ring = layer.state.ring_k if static else layer.rows.ring_k
        assert ring.dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 64},
    ],
)
@pytest.mark.parametrize("static", [0, 140])
def test_ways_to_generate(options: dict[str, Any], static: int) -> None:
    check_generates(llama(), padded(90, 70), static=static, **options)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gemma4"])
def test_beams_in_hybrid_models(name: str) -> None:
    check_generates(hybrid(name), padded(40, 12), num_beams=3)


@pytest.mark.parametrize("beams", [1, 3])
def test_sampling_with_several_sequences(beams: int) -> None:
    """The same draws from the same probabilities."""
    model, outs = llama(), []
    for packed in (False, True):
        torch.manual_seed(5)
        if packed:
            model.set_attn_implementation(NAME)
        cache = QuantizedCache(model.config, EXACT) if packed else DynamicCache(config=model.config)
        options = GREEDY | {"do_sample": True, "num_return_sequences": 3, "num_beams": beams, "max_new_tokens": 20}
        outs.append(model.generate(**padded(30, 7), past_key_values=cache, **options))
    assert torch.equal(*outs)


@pytest.mark.parametrize("static", [0, 100])
def test_assisted_decoding(static: int) -> None:
    """Drafts of another model, and of the prompt's own text; rejected tokens are taken back."""
    check_generates(llama(), {"input_ids": ids(20, 1)}, assistant_model=llama(1), static=static)
    repeated = {"input_ids": ids(10, 1).repeat(1, 4)}
    check_generates(llama(), repeated, prompt_lookup_num_tokens=4, static=static)


def test_assisted_decoding_with_windows() -> None:
    model = hybrid("gemma3")
    check_generates(model, {"input_ids": ids(10, 1).repeat(1, 4)}, prompt_lookup_num_tokens=4)
