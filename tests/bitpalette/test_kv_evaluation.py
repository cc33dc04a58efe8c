"""Evaluation through packed caches against a forward without any, the formula of memory, needles and orders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bitpalette import kv_evaluation
from bitpalette.calibrate.evaluate import evaluate
from bitpalette.calibrate.text import CalibrationError
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_evaluation import evaluate_cache
from bitpalette.kv_needle import NAMES, PAIRS, Cell, needle_table, prompt_of, score
from bitpalette.kv_order import layer_order, with_orders
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}


def build(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.15)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(LlamaForCausalLM, LlamaConfig(**SIZES))


def tokens(chunks: int = 2, n: int = 150) -> Tensor:
    return torch.randint(3, 300, (chunks, n), generator=torch.Generator().manual_seed(0))


def plan(name: str) -> KVPlan:
    return KVPlan(KVFormat.parse(name, sinks=4, window=16))


def test_with_sixteen_bits_it_is_the_evaluation_without_a_cache(llama: Any) -> None:
    right = evaluate(llama, tokens(), llama)
    found = evaluate_cache(llama, tokens(), plan("16"), 7, llama)
    for perplexity in (found.perplexity, found.dense_perplexity, found.reference_perplexity):
        assert perplexity == pytest.approx(right.perplexity, rel=1e-5)
    assert abs(found.from_dense.kl) <= 1e-6 and found.from_dense.top1_agreement == 1
    assert found.bits_per_element == 16 and found.tokens == 300 and found.step == 7
    assert llama.config._attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize("name", ["k8v8", "k4v2", "k4v4-channel", "k4v4-bfp32"])
def test_packed_caches_are_compared_with_the_dense_one(name: str, llama: Any) -> None:
    found = evaluate_cache(llama, tokens(), plan(name), 16, llama)
    assert 0 < found.from_dense.kl < found.kl_packed < 1
    assert found.from_reference is not None
    assert found.from_reference.kl == pytest.approx(found.from_dense.kl, rel=1e-3)
    assert 0 < found.bytes == found.formula_bytes < found.dense_bytes == 2 * 2 * 150 * 2 * 32 * 4
    assert found.from_dense.standard_error > 0


def test_fewer_bits_are_further(llama: Any) -> None:
    kls = [evaluate_cache(llama, tokens(1), plan(f"k{b}v{b}")).from_dense.kl for b in (8, 4, 3, 2)]
    assert kls == sorted(kls)


def test_chunks_that_fit_the_window_read_nothing_packed(llama: Any) -> None:
    found = evaluate_cache(llama, tokens(1, 20), plan("k2v2"))
    assert math.isnan(found.kl_packed) and abs(found.from_dense.kl) <= 1e-6


def test_static_caches_are_of_tokens(llama: Any) -> None:
    with pytest.raises(KVError, match="not 'channel'; use static=False"):
        QuantizedCache(llama.config, plan("k2v2-channel"), tokens=100, static=True)


def test_memory_other_than_the_formula_is_an_error(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_evaluation, "cache_bytes", lambda *shape, **options: 1)
    with pytest.raises(KVError, match="the formula says 2"):
        evaluate_cache(llama, tokens(1, 20), plan("k2v2"))
    with pytest.raises(KVError, match="step of 0"):
        evaluate_cache(llama, tokens(1, 20), plan("k2v2"), 0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    class Bytes:
        """A token is a byte."""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, ids: Tensor) -> str:
            return bytes(ids.tolist()).decode()

    return Bytes()


TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def test_prompt_holds_its_pairs_where_it_should(tokenizer: Any) -> None:
    haystack = torch.tensor(list(TEXT.encode()))
    for depth in (0.0, 0.5, 1.0):
        prompt = prompt_of(tokenizer, haystack, 500, depth)
        text = tokenizer.decode(prompt.context)
        assert len(prompt.context) == 500 and len(prompt.questions) == PAIRS
        for question, number in prompt.questions:
            line = tokenizer.decode(torch.cat((question, number)))
            assert text.count(line + ".") == 1 and line.split()[4] in NAMES and line[-5:].isdigit()
        before = text.index("\nThe pass key")
        assert before == 0 or text[before - 1] == "."
        assert abs(before - depth * (500 - 34 * PAIRS)) <= 60
    assert torch.equal(prompt.context, prompt_of(tokenizer, haystack, 500, 1.0).context)
    assert not torch.equal(prompt.context, prompt_of(tokenizer, haystack, 500, 1.0, seed=1).context)
    with pytest.raises(CalibrationError, match="no room"):
        prompt_of(tokenizer, haystack, 100, 0)
    with pytest.raises(CalibrationError, match="longer one"):
        prompt_of(tokenizer, haystack[:100], 400, 0)


class _Knows(torch.nn.Module):
    """Answers with the tokens of a text: after position i its most likely token is text[i + 1]."""

    def __init__(self, text: Tensor, sure: float) -> None:
        super().__init__()
        self.text, self.sure, self.device = text, sure, torch.device("cpu")

    def forward(self, input_ids: Tensor, past_key_values: Any, **options: Any) -> Any:
        first = past_key_values.length
        past_key_values.length += input_ids.shape[1]
        logits = torch.zeros(1, input_ids.shape[1], 256)
        following = self.text[first + 1 : first + 1 + input_ids.shape[1]]
        logits[0].scatter_(1, following[:, None], self.sure)
        return type("Output", (), {"logits": logits})


class _Length:
    length = 0

    def crop(self, tokens: int) -> None:
        self.length += tokens


@pytest.mark.parametrize("sure", [5.0, -5.0, float("nan")])
def test_score_counts_what_greedy_decoding_writes(sure: float, tokenizer: Any) -> None:
    prompt = prompt_of(tokenizer, torch.tensor(list(TEXT.encode())), 300, 0.5)
    prompt.questions[1:] = []
    question, number = prompt.questions[0]
    model = _Knows(torch.cat((prompt.context, question, number, torch.zeros(1, dtype=torch.int64))), sure)
    found = score(model, _Length(), prompt)
    if sure == 5:
        assert found.answered == 1 and found.rank == 1
        assert found.probability == pytest.approx(math.exp(5) / (math.exp(5) + 255), rel=1e-5)
    else:
        assert found.answered == 0 and found.rank == (256 if sure == -5 else 257)


def test_needles_dense_against_packed(llama: Any, tokenizer: Any) -> None:
    cells = needle_table(llama, tokenizer, TEXT, plan("16"), [200, 300], [0, 1])
    assert [(c.length, c.depth) for c in cells] == [(200, 0), (200, 1), (300, 0), (300, 1)]
    for cell in cells:
        assert isinstance(cell, Cell)
        assert cell.packed.probability == pytest.approx(cell.dense.probability, rel=1e-4)
        assert (cell.packed.rank, cell.packed.answered) == (cell.dense.rank, cell.dense.answered)
    packed = needle_table(llama, tokenizer, TEXT, plan("k2v2"), [300], [0])[0].packed
    assert packed.probability != pytest.approx(cells[2].dense.probability, rel=1e-3)


def test_orders_are_those_of_the_weights(llama: Any) -> None:
    weight = llama.model.layers[1].self_attn.k_proj.weight.data
    weight[32 + 7] *= 20
    order = layer_order(llama, 1)
    assert order.shape == (2, 32) and set(order[1, :2].tolist()) == {7, 23}
    made = with_orders(KVPlan(KVFormat(), {1: KVFormat(kind="bfp32")}), llama, [0, 1])
    assert list(made.orders) == [1] and torch.equal(made.orders[1], order)
    assert with_orders(made, llama, [0, 1]) is made and with_orders(plan("4"), llama, [0, 1]).orders == {}
    qwen = build(Qwen3ForCausalLM, Qwen3Config(**SIZES))
    qwen.model.layers[0].self_attn.k_norm.weight.data[5] = 40.0  # behind the projection, the same for all heads
    assert set(layer_order(qwen, 0)[0, :2].tolist()) == {5, 21} == set(layer_order(qwen, 0)[1, :2].tolist())
    weight[32 + 7] /= 20


def test_a_model_without_key_weights_is_refused(families) -> None:
    with pytest.raises(KVError, match="no linear layer 'k_proj'"):
        layer_order(families["gpt2"](), 0)
