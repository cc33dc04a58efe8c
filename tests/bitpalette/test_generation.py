"""bitpalette.generate by the native decoder: the tokens of transformers' own loop, and what falls back to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import bitpalette
from bitpalette import generation
from bitpalette.quant.native import available_isas

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

NATIVE = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _said_nothing_yet() -> None:
    generation.say_fallback.cache_clear()


@pytest.fixture(params=NATIVE)
def model(request: pytest.FixtureRequest, families: dict[str, Callable[[], Any]]) -> Any:
    return families[request.param]()


@pytest.fixture
def llama(families: dict[str, Callable[[], Any]]) -> Any:
    return families["llama"]()


@pytest.mark.parametrize("prompt", [1, 8, 9, 19])
def test_greedy_tokens_are_those_of_transformers(
    model: Any, prompt: int, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    got = bitpalette.generate(model, ids[:1, :prompt], 24)
    want = model.generate(ids[:1, :prompt], max_new_tokens=24, do_sample=False)
    assert torch.equal(got, want)
    assert capsys.readouterr().err == ""


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 12},
    {"do_sample": True, "temperature": 1.5, "top_p": 0.8, "min_new_tokens": 20},
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    {"eos_token_id": list(range(4, 60))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_what_they_do_in_transformers(
    llama: Any, options: dict[str, Any], ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples too: both draw from torch's generator, once a token."""
    torch.manual_seed(5)
    got = bitpalette.generate(llama, ids[:1], 24, **options)
    torch.manual_seed(5)
    want = llama.generate(ids[:1], max_new_tokens=24, **{"do_sample": False, **options})
    assert torch.equal(got, want)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chunk", [5, 9, 19, 64])
def test_a_prompt_is_read_in_pieces(
    llama: Any, chunk: int, ids: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = bitpalette.generate(llama, ids[:1], 12)
    seen: list[int] = []
    update = DynamicCache.update

    def watched(self: DynamicCache, keys: Tensor, values: Tensor, layer: int, *args: Any, **options: Any) -> Any:
        if layer == 0:
            seen.append(keys.shape[2])
        return update(self, keys, values, layer, *args, **options)

    monkeypatch.setattr(DynamicCache, "update", watched)
    assert torch.equal(bitpalette.generate(llama, ids[:1], 12, prefill_chunk_size=chunk), want)
    assert seen == [len(part) for part in torch.arange(19).split(chunk)]
    assert capsys.readouterr().err == ""


def test_an_end_token_ends_it(llama: Any, ids: Tensor) -> None:
    free = bitpalette.generate(llama, ids[:1], 10)[0, 19:].tolist()
    stop = free[4]
    got = bitpalette.generate(llama, ids[:1], 10, eos_token_id=stop)[0, 19:].tolist()
    assert got == free[: free.index(stop) + 1]
    llama.generation_config.eos_token_id = [201, stop]
    assert bitpalette.generate(llama, ids[:1], 10)[0, 19:].tolist() == got


def test_generator_and_every_token(llama: Any, ids: Tensor) -> None:
    def draw(seed: int) -> tuple[list[int], list[int]]:
        heard: list[int] = []
        g = torch.Generator().manual_seed(seed)
        before = torch.random.get_rng_state()
        out = bitpalette.generate(llama, ids[:1], 12, do_sample=True, generator=g, on_token=heard.append)
        assert torch.equal(torch.random.get_rng_state(), before)
        return out[0, 19:].tolist(), heard

    first, heard = draw(1)
    assert first == heard
    assert draw(1)[0] == first
    assert draw(2)[0] != first


def test_streamer(llama: Any, ids: Tensor) -> None:
    class Kept:
        def __init__(self) -> None:
            self.parts: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.parts.append(value.tolist())

        def end(self) -> None:
            self.parts.append("end")

    ours, theirs = Kept(), Kept()
    bitpalette.generate(llama, ids[:1], 6, streamer=ours)
    llama.generate(ids[:1], max_new_tokens=6, do_sample=False, streamer=theirs)
    assert ours.parts == theirs.parts


FALLBACKS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {}, "GPT2LMHeadModel is none of LlamaForCausalLM"),
    ("llama", {"num_beams": 2}, "num_beams=2"),
    ("llama", {"use_cache": False}, "use_cache=False"),
    ("llama", {"attention_mask": torch.tensor([[0] * 3 + [1] * 16])}, "the attention mask hides tokens"),
    ("llama", {"logits_to_keep": 2}, "option logits_to_keep"),
]


@pytest.mark.parametrize(("family", "options", "reason"), FALLBACKS, ids=lambda v: str(v)[:30])
def test_fallback_is_said_once_and_works(
    family: str,
    options: dict[str, Any],
    reason: str,
    families: dict[str, Callable[[], Any]],
    ids: Tensor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = families[family]()
    want = model.generate(ids[:1], max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(bitpalette.generate(model, ids[:1], 6, **options), want)
    said = capsys.readouterr().err
    assert said.startswith(f"bitpalette: {type(model).__name__} generates by transformers' loop: ")
    assert reason in said and said.count("\n") == 1
    bitpalette.generate(model, ids[:1], 1, **options)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="on_token needs the native decoder"):
        bitpalette.generate(model, ids[:1], 1, on_token=print, **options)


def test_a_batch_falls_back(llama: Any, ids: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    want = llama.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(bitpalette.generate(llama, ids, 6), want)
    assert "[2, 19] are not one prompt" in capsys.readouterr().err


def test_two_threads_of_one_model(llama: Any, ids: Tensor) -> None:
    alone = [bitpalette.generate(llama, ids[i : i + 1], 30) for i in range(2)]
    got: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(4):
            got[i] = bitpalette.generate(llama, ids[i : i + 1], 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
