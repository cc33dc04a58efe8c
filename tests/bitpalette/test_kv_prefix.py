"""A prefix of the full-precision model: what caches hold with it, generate and batches over it, its file, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from bitpalette.formats.errors import FormatError
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_prefix import KEY, Prefix, compute_prefix, load_prefix, save_prefix, with_prefix
from bitpalette.quant.kv_format import KVError, KVFormat

EXACT = KVFormat(16, 16, 4, 8)
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def build(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.15)
    return model


@pytest.fixture
def llama() -> Any:
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES))
    model.set_attn_implementation(NAME)
    return model


def ids(n: int, rows: int = 1) -> Tensor:
    return torch.randint(3, 200, (rows, n), generator=torch.Generator().manual_seed(n))


def inputs_of(prefix: Prefix, prompts: Tensor, padding: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """[padding | prefix | prompt], cut to one length on the right."""
    rows = torch.cat((prefix.tokens.expand(len(prompts), -1), prompts), 1)
    mask = torch.ones_like(rows)
    for row, many in enumerate(padding):
        rows[row, many:], rows[row, :many], mask[row, :many] = rows[row, : rows.shape[1] - many].clone(), 0, 0
    return {"input_ids": rows, "attention_mask": mask}


@pytest.mark.parametrize("form", [EXACT, None, KVFormat(16, 16, 0, 4)], ids=["16", "dense", "no sinks"])
@pytest.mark.parametrize("padding", [(0, 0, 0), (2, 0, 9)], ids=["even", "padded"])
def test_a_prefix_of_the_model_itself_changes_nothing(form: KVFormat | None, padding: tuple, llama: Any) -> None:
    prefix = compute_prefix(llama, ids(6)[0])
    inputs = inputs_of(prefix, ids(20, 3), padding)
    assert prefix.begins(inputs["input_ids"]) == (not any(padding))

    def empty() -> Any:
        return DynamicCache(config=llama.config) if form is None else QuantizedCache(llama.config, form)

    plain = llama.generate(**inputs, past_key_values=empty(), **GREEDY)
    cache = with_prefix(empty(), prefix, 3, padding=list(padding))
    assert cache.get_seq_length() == 6
    assert torch.equal(llama.generate(**inputs, past_key_values=cache, **GREEDY), plain)


def test_keys_of_another_model_are_read_and_stay_exact(llama: Any) -> None:
    """A changed model with the prefix of the right one: its sinks are the right ones' numbers, and its logits are those
    of attention over them."""
    prefix = compute_prefix(llama, ids(4)[0])
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    rows = inputs_of(prefix, ids(150))["input_ids"]
    caches = [with_prefix(QuantizedCache(llama.config, KVFormat(2, 2, 4, 8)), prefix)]
    caches += [
        with_prefix(QuantizedCache(llama.config, EXACT), prefix),
        with_prefix(DynamicCache(config=llama.config), prefix),
    ]
    with torch.no_grad():
        found = [llama(input_ids=rows[:, 4:], past_key_values=cache).logits for cache in caches]
        bare = llama(input_ids=rows, past_key_values=DynamicCache(config=llama.config)).logits[:, 4:]
    assert ((found[1] - found[2]).abs() <= 1e-4).all()
    assert not ((found[1] - bare).abs() <= 1e-2).all()
    for index, (keys, values) in prefix.layers.items():
        stored = caches[0].packed[index].rows
        right = stored.stored(keys[None], values[None])
        assert torch.equal(stored.sink_k, right[0]) and torch.equal(stored.sink_v, right[1])


def test_a_long_prefix_is_packed_behind_its_sinks(llama: Any) -> None:
    prefix = compute_prefix(llama, ids(100)[0])
    cache = with_prefix(QuantizedCache(llama.config, KVFormat(4, 4, 4, 8)), prefix, 2)
    rows = cache.packed[0].rows
    assert rows.lengths.tolist() == [100, 100] and rows.quantized.tolist() == [92, 92]
    whole = QuantizedCache(llama.config, KVFormat(4, 4, 4, 8))
    with torch.no_grad():
        llama(input_ids=prefix.tokens[None], past_key_values=whole)
    for layer, other in zip(cache.packed, whole.packed, strict=True):
        assert torch.equal(layer.rows.pool.keys.codes[0], other.rows.pool.keys.codes[0])


def test_file(tmp_path: Path, llama: Any) -> None:
    prefix, path = compute_prefix(llama, ids(6)[0]), tmp_path / "prefix.safetensors"
    save_prefix(path, prefix)
    back = load_prefix(path)
    assert torch.equal(back.tokens, prefix.tokens) and list(back.layers) == [0, 1]
    for index, pair in prefix.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, back.layers[index], strict=True))
    tensors, good = load_file(path), {KEY: json.dumps({"version": 1})}
    for change, metadata, message in (
        ({}, {}, "no prefix"),
        ({}, {KEY: "7"}, "no prefix"),
        ({}, {KEY: json.dumps({"version": 2})}, "version 2"),
        ({"more": torch.zeros(1)}, good, "not those of a prefix"),
        ({"layer.1.keys": torch.zeros(2, 5, 16)}, good, "layer 1 has"),
        ({"layer.0.values": torch.full((2, 6, 16), float("nan"))}, good, "no number"),
    ):
        save_file(tensors | change, path, metadata)
        with pytest.raises(FormatError, match=message):
            load_prefix(path)


def test_hybrid_models(llama: Any) -> None:
    types = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=types)
    gemma = build(Gemma3ForCausalLM, config)
    gemma.set_attn_implementation(NAME)
    prefix = compute_prefix(gemma, ids(6)[0])
    inputs = inputs_of(prefix, ids(20))
    plain = gemma.generate(**inputs, past_key_values=DynamicCache(config=config), **GREEDY)
    cache = with_prefix(QuantizedCache(config, EXACT), prefix)
    assert torch.equal(gemma.generate(**inputs, past_key_values=cache, **GREEDY), plain)
    with pytest.raises(KVError, match="sliding window"):
        compute_prefix(gemma, ids(30)[0])


def test_refusals(llama: Any) -> None:
    prefix = compute_prefix(llama, ids(6)[0])
    with pytest.raises(KVError, match="one row"):
        compute_prefix(llama, ids(6))
    cache = with_prefix(QuantizedCache(llama.config, EXACT), prefix)
    with pytest.raises(KVError, match="has 6 tokens"):
        with_prefix(cache, prefix)
    with pytest.raises(KVError, match="one number of tokens a row"):
        with_prefix(QuantizedCache(llama.config, EXACT), prefix, 2, padding=[1])
    with pytest.raises(KVError, match="for a cache that grows"):
        with_prefix(QuantizedCache(llama.config, EXACT, tokens=50, static=True), prefix)
    short = LlamaConfig(**(SIZES | {"num_hidden_layers": 1}))
    with pytest.raises(KVError, match=r"layers \[1\], the cache has 1"):
        with_prefix(QuantizedCache(short, EXACT), prefix)
    long = LlamaConfig(**(SIZES | {"num_hidden_layers": 3}))
    with pytest.raises(KVError, match="layer 2 of the cache"):
        with_prefix(QuantizedCache(long, EXACT), prefix)
