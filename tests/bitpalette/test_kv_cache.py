"""The packed cache in transformers: packed rows do not depend on how tokens came nor on each other, `crop` leaves no
trace, and what cannot be done is refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kv_models import EXACT, GREEDY, SIZES, SMALL, hybrid, ids, llama, logits, packed_llama, padded
from transformers import DynamicCache, FalconH1Config, LlamaConfig, LlamaForCausalLM, StaticCache, T5Config

from bitpalette.kernels.kv_kernel import FORCE_VARIABLE
from bitpalette.kernels.kv_pages import PagePool
from bitpalette.kernels.kv_rows import cache_bytes
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan


@pytest.fixture
def model() -> Any:
    return packed_llama()


def test_packed_rows_do_not_know_each_other(model) -> None:
    inputs = padded(150, 70)
    means = {i: torch.randn(2, 16) for i in range(2)}
    plan = KVPlan(SMALL, {1: KVFormat(4, 16, 2, 5)}, means)
    together = logits(model, QuantizedCache(model.config, plan), inputs["input_ids"], 10, inputs["attention_mask"])
    for row, start in ((0, 0), (1, 70)):
        alone = logits(model, QuantizedCache(model.config, plan), inputs["input_ids"][row : row + 1, start:], 10)
        assert ((together[row : row + 1, start:] - alone).abs() <= 1e-3).all()


def test_eight_bits_are_close_and_fewer_are_less(model) -> None:
    tokens = ids(150)
    right = logits(model, QuantizedCache(model.config, EXACT), tokens, 10)
    errors = [
        float((logits(model, QuantizedCache(model.config, KVFormat(b, b, 4, 8)), tokens, 10) - right).square().mean())
        for b in (8, 4, 3, 2)
    ]
    assert errors == sorted(errors) and 0 < errors[0] <= 1e-3 * float(right.square().mean())


@pytest.mark.parametrize("drop", [1, 3, 9, 40])
def test_crop_then_continue_is_never_having_appended(drop: int, model) -> None:
    first, other, rest = ids(100), ids(drop, seed=1), ids(20, seed=2)
    plain, cropped = (QuantizedCache(model.config, SMALL) for _ in range(2))
    for cache in (plain, cropped):
        cache.activate_past_recording()  # both: the size of the ring decides where its sums are broken
        logits(model, cache, first, 25)
    logits(model, cropped, other, 2)
    cropped.crop(-drop)
    assert cropped.get_seq_length() == 100
    assert torch.equal(logits(model, plain, rest, 1), logits(model, cropped, rest, 1))


def test_crop_of_one_forward_needs_no_room(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")  # whose queries are not rounded, so that little differs
    plain, cropped = (QuantizedCache(model.config, SMALL) for _ in range(2))
    for cache in (plain, cropped):
        logits(model, cache, ids(100), 100)
    logits(model, plain, ids(4, seed=1), 4)
    logits(model, cropped, torch.cat((ids(4, seed=1), ids(30, seed=3)), 1), 34)
    cropped.crop(-30)
    # the model's own products of 4 and of 34 tokens differ in their last bits
    apart = logits(model, plain, ids(9, seed=2), 1) - logits(model, cropped, ids(9, seed=2), 1)
    assert (apart.abs() <= 1e-4).all()


def test_select_repeat_and_reset(model) -> None:
    cache = QuantizedCache(model.config, SMALL)
    first = logits(model, cache, ids(80), 20)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    swapped = QuantizedCache(model.config, SMALL)
    logits(model, swapped, ids(80).flip(0), 20)
    rest = ids(10, seed=1)
    assert torch.equal(logits(model, cache, rest, 1), logits(model, swapped, rest, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, cache, ids(80), 20), first)


def test_memory(model) -> None:
    cache = QuantizedCache(model.config, SMALL, tokens=400)
    logits(model, cache, ids(400), 100)
    assert cache.nbytes == 2 * cache_bytes(SMALL, 400, 2, 2, 16, itemsize=4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_dense_caches_and_none_are_read_as_transformers_does(name: str) -> None:
    """Without padding and with it, at once and in pieces, with softcaps and logits of sinks."""
    model = llama() if name == "llama" else hybrid(name)
    model.set_attn_implementation("sdpa" if name == "llama" else "eager")
    inputs = padded(30, 7)

    def found() -> list[torch.Tensor]:
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        bare = [model(**inputs).logits, model(tokens).logits]
        caches = [DynamicCache(config=model.config) for _ in range(3)] + [StaticCache(model.config, max_cache_len=40)]
        steps, masks = (30, 11, 11, 11), (mask, mask, None, None)
        rest = [logits(model, c, tokens, n, m) for c, n, m in zip(caches, steps, masks, strict=True)]
        return [out[mask.bool()] for out in bare + rest]

    right = found()
    model.set_attn_implementation(NAME)
    for ours, theirs in zip(found(), right, strict=True):
        assert ((ours - theirs).abs() <= 1e-4).all()


@pytest.mark.parametrize("copied", [QuantizedCache.fork, copy.deepcopy])
@pytest.mark.parametrize("form", [SMALL, KVFormat(4, 4, 0, 0), EXACT])
def test_several_continuations_of_one_prompt(form: KVFormat, copied: Any, model) -> None:
    """Each is as if it were the only one, in whatever order they go on; none sees another's tokens."""
    prompt, rest = ids(150), [ids(n, seed=n) for n in (80, 21, 140)]
    first = QuantizedCache(model.config, form)
    logits(model, first, prompt, 75)  # packed at once, up to the middle of a page
    caches = [first, copied(first), copied(first)]
    parts = [[], [], []]
    for start in range(0, 140, 20):  # by turns
        for cache, tokens, found in zip(caches, rest, parts, strict=True):
            if start < tokens.shape[1]:
                found.append(logits(model, cache, tokens[:, start : start + 20], 10))
    for tokens, found in zip(rest, parts, strict=True):
        alone = QuantizedCache(model.config, form)
        logits(model, alone, prompt, 75)
        assert torch.equal(torch.cat(found, 1), logits(model, alone, tokens, 10))


def test_forks_share_pages_until_they_write(model) -> None:
    first = QuantizedCache(model.config, SMALL)
    logits(model, first, ids(300, 1), 100)
    pool = first.layers[0].rows.pool
    before = pool.pages - len(pool.free)
    forks = [first.fork() for _ in range(5)]
    assert pool.pages - len(pool.free) == before
    logits(model, forks[0], ids(30, 1, seed=1), 10)
    assert pool.pages - len(pool.free) == before + 1  # the page that was half full
    forks.clear()
    assert pool.pages - len(pool.free) == before and set(pool.users) <= {0, 1}  # at once, not when gc runs


def test_prefix_through_generate() -> None:
    model = packed_llama()
    prompt = ids(100, 1)
    cache = QuantizedCache(model.config, EXACT)
    logits(model, cache, prompt[:, :70], 70)
    fresh = model.generate(input_ids=prompt, past_key_values=QuantizedCache(model.config, EXACT), **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=prompt, past_key_values=cache.fork(), **GREEDY), fresh)
    again = model.generate(input_ids=prompt, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(again, fresh) and cache.get_seq_length() == 70


def scrambled(pool: PagePool) -> None:
    """As bytes on another device would be: of no use here."""
    for side in (pool.keys, pool.values):
        side.codes = 255 - side.codes


class FakeOffloading(QuantizedCache):
    """As transformers' `Cache.update` with offloading, without a GPU's streams."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].offload()
        return found


def test_offloaded_pages_come_back(model, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    for name in ("offload", "fetch"):
        original = getattr(PagePool, name)

        def move(pool: PagePool, original: Any = original, name: str = name) -> None:
            before = pool.away
            original(pool)
            if pool.away != before:
                moves.append(name)
                scrambled(pool)

        monkeypatch.setattr(PagePool, name, move)
    near, far = QuantizedCache(model.config, SMALL), FakeOffloading(model.config, SMALL)
    assert torch.equal(logits(model, near, ids(100), 30), logits(model, far, ids(100), 30))
    assert torch.equal(logits(model, near, ids(9, seed=1), 1), logits(model, far, ids(9, seed=1), 1))
    assert far.layers[1].rows.pool.away and moves.count("offload") >= 20
    for cache in (near, far):
        cache.batch_select_indices(torch.tensor([1, 0, 1]))  # appends what is pending
        cache.crop(-3)
    assert torch.equal(logits(model, near, ids(9, 3), 1), logits(model, far, ids(9, 3), 1))


def test_a_layer_lives_where_its_keys_are(model) -> None:
    layer = QuantizedCache(model.config, KVPlan(EXACT, means={1: torch.zeros(2, 16)})).layers[1]
    keys = torch.empty(1, 2, 3, 16, device="meta")
    layer.lazy_initialization(keys, keys)
    tensors = [layer.rows.ring_k, layer.rows.sink_v, layer.rows.pool.keys.codes, layer.rows.mean]
    assert {t.device.type for t in tensors} == {"meta"}


def test_a_compiled_model_with_a_growing_cache(model) -> None:
    """Right, with the cache outside of the graphs; as one graph it is refused."""
    compiled = torch.compile(model, backend="eager")
    mine, right = QuantizedCache(model.config, SMALL), QuantizedCache(model.config, SMALL)
    assert torch.equal(logits(compiled, mine, ids(40), 20), logits(model, right, ids(40), 20))
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="static=True"):
        logits(whole, QuantizedCache(model.config, SMALL), ids(40), 20)


def refused(words: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(KVError, match=words) as found:
        call(*args, **options)
    assert "\n" not in str(found.value)


def test_models_that_are_refused(families, model, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("nothing to pack", QuantizedCache, families["mistral"]().config, "k4v4")
    refused("kv_lora_rank=28", QuantizedCache, families["deepseek_v2"]().config, "k4v4")
    refused("encoder-decoder", QuantizedCache, T5Config(), "k4v4")
    refused("'hybrid'", QuantizedCache, FalconH1Config(num_hidden_layers=2), "k4v4")
    refused(r"layers \[5\]", QuantizedCache, model.config, KVPlan(SMALL, {5: EXACT}))
    other = families["llama"]()
    other.set_attn_implementation(NAME)
    refused("in steps of 8, not 18", logits, other, QuantizedCache(other.config, "k4v4"), ids(5), 5)
    falcon = families["falcon"]()
    falcon.set_attn_implementation(NAME)  # transformers warns and changes nothing
    refused("attention of its own", logits, falcon, QuantizedCache(falcon.config, EXACT), ids(5), 5)
    refused("tokens=0", QuantizedCache, model.config, SMALL, static=True)
    refused("leave one of the two out", QuantizedCache, model.config, SMALL, 9, static=True, offloading=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("there is no GPU", QuantizedCache, model.config, SMALL, offloading=True)


@pytest.mark.parametrize("static", [False, True])
def test_masks_that_are_refused(static: bool, model) -> None:
    def cache() -> QuantizedCache:
        return QuantizedCache(model.config, SMALL, 64 * static, static=static)

    holes = torch.ones(2, 9, dtype=torch.int64)
    holes[0, 4] = 0
    refused("not left padding", model, input_ids=ids(9), attention_mask=holes, past_key_values=cache())
    right = torch.ones(2, 9, dtype=torch.int64)
    right[0, 7:] = 0
    refused("left", model, input_ids=ids(9), attention_mask=right, past_key_values=cache())
    for dtype in (torch.bool, torch.float32):
        mask = torch.ones(2, 1, 9, 9, dtype=dtype)
        refused("causal masks", model, input_ids=ids(9), attention_mask=mask, past_key_values=cache())
    held = cache()
    model(**padded(9, 3), past_key_values=held)
    mask = torch.ones(2, 10, dtype=torch.int64)
    refused("mask of all tokens in every forward", model, input_ids=ids(1), attention_mask=mask, past_key_values=held)
    held = cache()
    model(input_ids=ids(9), past_key_values=held)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[:, 9:12] = 0
    refused("not left padding|tells of", model, input_ids=ids(4), attention_mask=mask, past_key_values=held)


def test_padding_that_is_forgotten(model) -> None:
    cache = QuantizedCache(model.config, SMALL)
    model(**padded(9, 3), past_key_values=cache)
    refused("mask of all tokens in every forward", model, input_ids=ids(1), past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
def test_calls_that_are_refused(static: bool, model) -> None:
    def cache() -> QuantizedCache:
        return QuantizedCache(model.config, SMALL, 64 * static, static=static)

    held = cache()
    model(input_ids=ids(9), past_key_values=held)
    refused("2 rows, 1 came", model, input_ids=ids(1, 1), past_key_values=held)
    for tokens in (1, -10):
        refused("minus the number", held.crop, tokens)
    for name in ("position_bias", "cu_seq_lens_q"):
        refused("does not know", model, input_ids=ids(3), past_key_values=cache(), **{name: torch.zeros(1)})
    refused("no weights", model, input_ids=ids(3), past_key_values=cache(), output_attentions=True)
    wild = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, attention_dropout=0.5)).requires_grad_(False)
    wild.set_attn_implementation(NAME)
    refused("no dropout", wild.train(), input_ids=ids(3), past_key_values=QuantizedCache(wild.config, SMALL))

    model.set_attn_implementation("sdpa")
    refused("set_attn_implementation", model, input_ids=ids(1), past_key_values=held)


@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_right_or_refused(static: bool) -> None:
    """Of a prompt, which reads no pages, they are right; through pages a backward pass is refused, and a forward that
    records gradients for nobody is not."""
    model = packed_llama().requires_grad_(True)
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(input_ids=ids(20), use_cache=False).logits.square().sum().backward()
    right, weight.grad = weight.grad, None
    cache = QuantizedCache(model.config, SMALL, 64 * static, static=static)
    model(input_ids=ids(20), past_key_values=cache).logits.square().sum().backward()
    assert ((weight.grad - right).abs() <= 1e-4 * right.abs().max()).all()
    out = model(input_ids=ids(3), past_key_values=cache).logits
    refused("no gradients", out.sum().backward)


@pytest.mark.parametrize("static", [False, True])
def test_attention_that_never_reads(static: bool, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the first forward that has a second layer, at the second one of a model of one layer."""
    cache = QuantizedCache(model.config, SMALL, 64 * static, static=static)
    k = torch.randn(1, 2, 3, 16)
    cache.layers[0].update(k, k)
    refused("0 of 1 attentions|not all of 1", cache.layers[0].update, k, k)
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def lossy(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        update = past_key_values.update

        class Lossy:
            def update(self, *args: Any) -> Any:
                return tuple(t.clone() for t in update(*args))

        return forward(self, *args, past_key_values=Lossy(), **kwargs)

    monkeypatch.setattr(attention, "forward", lossy)
    cache = QuantizedCache(model.config, SMALL, 64 * static, static=static)
    refused("0 of 1 attentions", model, input_ids=ids(9), past_key_values=cache)


def test_static_caches_refuse_what_has_no_fixed_size(model) -> None:
    cache = QuantizedCache(model.config, SMALL, 64, static=True)
    refused("copy.deepcopy", cache.fork)
    refused("not offloaded", cache.layers[0].offload)
    model(input_ids=ids(20), past_key_values=cache)
    with pytest.raises(KVError, match="say tokens="):
        logits(model, cache, ids(150), 10)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_means_under_a_soft_cap_or_logits_of_sinks_are_refused(name: str, static: bool) -> None:
    """There the scores' common part <q, mean> does not cancel."""
    model = hybrid(name)
    model.set_attn_implementation(NAME)
    layer = next(iter(QuantizedCache(model.config, SMALL).packed)).index
    plan = KVPlan(SMALL, means={layer: torch.ones(2, 16)})
    cache = QuantizedCache(model.config, plan, 64 * static, static=static)
    with pytest.raises(KVError, match=rf"layer {layer}: .*leave its mean out of the plan"):
        logits(model, cache, ids(40), 20)
