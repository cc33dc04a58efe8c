"""The packed cache in transformers: 16-bit pages give the tokens of the dense cache, packed ones do not depend on how
tokens came, and what cannot be done is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitpalette.kernels.kv_kernel import FORCE_VARIABLE
from bitpalette.kernels.kv_rows import cache_bytes
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan

EXACT = KVFormat(16, 16, 4, 8)
SMALL = KVFormat(3, 2, 4, 8)
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model_class: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.15)
    return model


@pytest.fixture
def llama() -> Any:
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=2))
    model.set_attn_implementation(NAME)
    return model


def ids(n: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (rows, n), generator=torch.Generator().manual_seed(seed))


def padded(n: int, padding: int) -> dict[str, Tensor]:
    tokens, mask = ids(n), torch.ones(2, n, dtype=torch.int64)
    tokens[1, :padding], mask[1, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def check_generates(model: Any, inputs: dict[str, Tensor], form: KVFormat = EXACT, **options: Any) -> None:
    """Greedy or beam search: the same tokens as with transformers' own attention and cache."""
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None} | options
    dense = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    packed = model.generate(**inputs, past_key_values=QuantizedCache(model.config, form), **options)
    model.set_attn_implementation(before)
    assert torch.equal(dense, packed)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "mixtral"])
def test_tokens_of_the_dense_cache(name: str, families) -> None:
    check_generates(families[name](), padded(30, 7))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=2))
    check_generates(model, padded(90, 70), **options)


def test_hybrid_models_keep_their_windows() -> None:
    types = ["sliding_attention", "full_attention"]
    gemma = build(
        Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, num_hidden_layers=2, sliding_window=9, layer_types=types)
    )
    check_generates(gemma, padded(30, 12))
    config = GptOssConfig(
        **SIZES, num_hidden_layers=2, sliding_window=9, layer_types=types, num_local_experts=2, num_experts_per_tok=1
    )
    check_generates(build(GptOssForCausalLM, config), padded(30, 12))  # with logits of sinks


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("width", [16, 80, 96])
def test_head_shapes(heads: int, width: int) -> None:
    sizes = SIZES | {"num_key_value_heads": heads, "head_dim": width}
    check_generates(build(LlamaForCausalLM, LlamaConfig(**sizes, num_hidden_layers=1)), padded(30, 7), max_new_tokens=5)


def test_assisted_decoding() -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=2))
    assistant = build(LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=1))
    inputs = {"input_ids": ids(20, 1)}
    check_generates(model, inputs, assistant_model=assistant)
    check_generates(model, {"input_ids": ids(10, 1).repeat(1, 4)}, prompt_lookup_num_tokens=4)


def logits(model: Any, cache: QuantizedCache, tokens: Tensor, step: int, mask: Tensor | None = None) -> Tensor:
    """Through the cache, `step` tokens a forward: float32 [rows, n, vocabulary]."""
    out, past = [], cache.get_seq_length()
    with torch.no_grad():
        for first in range(0, tokens.shape[1], step):
            part = tokens[:, first : first + step]
            seen = None if mask is None else mask[:, : past + first + part.shape[1]]
            positions = None if seen is None else (seen.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            found = model(input_ids=part, past_key_values=cache, attention_mask=seen, position_ids=positions)
            out.append(found.logits)
    return torch.cat(out, 1)


def test_packed_rows_do_not_know_each_other(llama) -> None:
    inputs = padded(150, 70)
    means = {i: torch.randn(2, 16) for i in range(2)}
    plan = KVPlan(SMALL, {1: KVFormat(4, 16, 2, 5)}, means)
    together = logits(llama, QuantizedCache(llama.config, plan), inputs["input_ids"], 10, inputs["attention_mask"])
    for row, start in ((0, 0), (1, 70)):
        alone = logits(llama, QuantizedCache(llama.config, plan), inputs["input_ids"][row : row + 1, start:], 10)
        assert ((together[row : row + 1, start:] - alone).abs() <= 1e-3).all()


def test_eight_bits_are_close_and_fewer_are_less(llama) -> None:
    tokens = ids(150)
    right = logits(llama, QuantizedCache(llama.config, EXACT), tokens, 10)
    errors = [
        float((logits(llama, QuantizedCache(llama.config, KVFormat(b, b, 4, 8)), tokens, 10) - right).square().mean())
        for b in (8, 4, 3, 2)
    ]
    assert errors == sorted(errors) and 0 < errors[0] <= 1e-3 * float(right.square().mean())


@pytest.mark.parametrize("drop", [1, 3, 9, 40])
def test_crop_then_continue_is_never_having_appended(drop: int, llama) -> None:
    first, other, rest = ids(100), ids(drop, seed=1), ids(20, seed=2)
    plain, cropped = (QuantizedCache(llama.config, SMALL) for _ in range(2))
    for cache in (plain, cropped):
        cache.activate_past_recording()  # both: the size of the ring decides where its sums are broken
        logits(llama, cache, first, 25)
    logits(llama, cropped, other, 2)
    cropped.crop(-drop)
    assert cropped.get_seq_length() == 100
    assert torch.equal(logits(llama, plain, rest, 1), logits(llama, cropped, rest, 1))


def test_crop_of_one_forward_needs_no_room(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")  # whose queries are not rounded, so that little differs
    plain, cropped = (QuantizedCache(llama.config, SMALL) for _ in range(2))
    for cache in (plain, cropped):
        logits(llama, cache, ids(100), 100)
    logits(llama, plain, ids(4, seed=1), 4)
    logits(llama, cropped, torch.cat((ids(4, seed=1), ids(30, seed=3)), 1), 34)
    cropped.crop(-30)
    # the model's own products of 4 and of 34 tokens differ in their last bits
    apart = logits(llama, plain, ids(9, seed=2), 1) - logits(llama, cropped, ids(9, seed=2), 1)
    assert (apart.abs() <= 1e-4).all()


def test_select_repeat_and_reset(llama) -> None:
    cache = QuantizedCache(llama.config, SMALL)
    first = logits(llama, cache, ids(80), 20)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    swapped = QuantizedCache(llama.config, SMALL)
    logits(llama, swapped, ids(80).flip(0), 20)
    rest = ids(10, seed=1)
    assert torch.equal(logits(llama, cache, rest, 1), logits(llama, swapped, rest, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(llama, cache, ids(80), 20), first)


def test_memory(llama) -> None:
    cache = QuantizedCache(llama.config, SMALL, tokens=400)
    logits(llama, cache, ids(400), 100)
    assert cache.nbytes == 2 * cache_bytes(SMALL, 400, 2, 2, 16, itemsize=4)


def test_dense_caches_and_none_are_read_as_sdpa_does(llama) -> None:
    inputs = padded(30, 7)
    ours = llama(**inputs, past_key_values=DynamicCache(config=llama.config)).logits
    bare = llama(**inputs).logits
    llama.set_attn_implementation("sdpa")
    right = llama(**inputs).logits
    for found in (ours, bare):
        assert ((found - right).abs()[inputs["attention_mask"].bool()] <= 1e-5).all()


def test_dense_caches_in_chunks(llama) -> None:
    tokens = ids(30)
    right = llama(input_ids=tokens).logits
    found = logits(llama, DynamicCache(config=llama.config), tokens, 7)
    assert ((found - right).abs() <= 1e-5).all()


def test_refusals(llama, families) -> None:
    config = llama.config
    with pytest.raises(KVError, match="nothing to pack"):
        QuantizedCache(families["mistral"]().config, "k4v4")
    with pytest.raises(KVError, match="kv_lora_rank=28"):
        QuantizedCache(families["deepseek_v2"]().config, "k4v4")
    with pytest.raises(KVError, match=r"layers \[5\]"):
        QuantizedCache(config, KVPlan(SMALL, {5: EXACT}))
    other = families["llama"]()
    other.set_attn_implementation(NAME)
    with pytest.raises(KVError, match="in steps of 8, not 18"):
        logits(other, QuantizedCache(other.config, "k4v4"), ids(5), 5)

    cache = QuantizedCache(config, SMALL)
    holes = torch.ones(2, 9, dtype=torch.int64)
    holes[0, 4] = 0
    with pytest.raises(KVError, match="not left padding"):
        llama(input_ids=ids(9), attention_mask=holes, past_key_values=cache)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(KVError, match="causal masks"):
        llama(input_ids=ids(9), attention_mask=mask, past_key_values=QuantizedCache(config, SMALL))

    cache = QuantizedCache(config, SMALL)
    llama(**padded(9, 3), past_key_values=cache)
    with pytest.raises(KVError, match="mask of all tokens in every forward"):
        llama(input_ids=ids(1), past_key_values=cache)

    cache = QuantizedCache(config, SMALL)
    llama(input_ids=ids(9), past_key_values=cache)
    with pytest.raises(KVError, match="2 rows, 1 came"):
        llama(input_ids=ids(1, 1), past_key_values=cache)
    for tokens in (1, -10):
        with pytest.raises(KVError, match="minus the number"):
            cache.crop(tokens)
    with pytest.raises(KVError, match="not offloaded"):
        cache.layers[0].offload()

    llama.set_attn_implementation("sdpa")
    with pytest.raises(KVError, match="set_attn_implementation"):
        llama(input_ids=ids(1), past_key_values=cache)


def test_attention_that_never_reads(llama) -> None:
    layer = QuantizedCache(llama.config, SMALL).layers[0]
    k = torch.randn(1, 2, 3, 16)
    layer.update(k, k)
    with pytest.raises(KVError, match="never read the cache"):
        layer.update(k, k)
