"""A needle in a haystack, dense cache against packed: pairs of a name and a number stand somewhere in long text, and the
model is asked for the numbers at its end.

The pairs are lines "The pass key of Maria is 48213.", four of them together; the question repeats such a line up to the
number, which models of a hundred million parameters can complete too. The haystack is one prompt; the question is read
behind it, from the packed pages. Every number is scored teacher-forced: the probability of its tokens, and whether each
is the most likely one, which is the case exactly where greedy decoding writes the number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .calibrate.text import CalibrationError, tokenize
from .kv_cache import QuantizedCache
from .kv_evaluation import log_probabilities, reading_packed
from .kv_load import packed_layers
from .kv_order import with_orders
from .quant.kv_plan import KVPlan

NAMES = ("Maria", "Peter", "Susan", "David", "Laura", "Kevin", "Emily", "Frank")
LINE = "The pass key of {name} is"
PAIRS = 4
CHUNK = 512
"""Tokens of the prompt a forward."""

SEARCH = 48
"""Tokens back to the end of a sentence, where the pairs go; else they go where they fall."""


@dataclass(frozen=True)
class Score:
    """answered: share of the numbers that greedy decoding writes. probability: geometric mean over the tokens of the
    numbers. rank: mean rank of those tokens, 1 where all are the most likely."""

    answered: float
    probability: float
    rank: float


@dataclass(frozen=True)
class Cell:
    """length: tokens of the prompt, pairs included. depth: share of the haystack before them."""

    length: int
    depth: float
    dense: Score
    packed: Score


@dataclass(frozen=True)
class Prompt:
    """context int64 [length], and for every number (question, number) int64."""

    context: Tensor
    questions: list[tuple[Tensor, Tensor]]


def prompt_of(tokenizer: Any, haystack: Tensor, length: int, depth: float, seed: int = 0) -> Prompt:
    """PAIRS pairs in haystack tokens int64 [n]. CalibrationError where it is too short for a prompt of `length`, or
    the length for the pairs."""
    draw = random.Random(f"{seed}/{length}/{depth}")
    pairs = [(name, str(draw.randrange(10000, 100000))) for name in draw.sample(NAMES, PAIRS)]
    lines = "".join(f"\n{LINE.format(name=name)} {number}." for name, number in pairs) + "\n"
    needle = tokenize(tokenizer, lines)
    room = length - len(needle)
    if room < 0:
        raise CalibrationError(
            f"a prompt of {length} tokens has no room for {len(needle)} tokens of pairs; ask for more"
        )
    if len(haystack) < room:
        raise CalibrationError(
            f"the text has {len(haystack)} tokens, a prompt of {length} needs {room}; give a longer one"
        )
    at = _sentence_end(tokenizer, haystack, round(depth * room))
    context = torch.cat((haystack[:at], needle, haystack[at:room]))
    questions = []
    for name, number in pairs:
        question = tokenize(tokenizer, f"\n{LINE.format(name=name)}")
        questions.append((question, tokenize(tokenizer, f"\n{LINE.format(name=name)} {number}")[len(question) :]))
    return Prompt(context, questions)


def _sentence_end(tokenizer: Any, tokens: Tensor, at: int) -> int:
    for place in range(at, max(at - SEARCH, 0), -1):
        if tokenizer.decode(tokens[place - 1 : place]).endswith((".", "\n")):
            return place
    return at


@torch.no_grad()
def score(model: Any, cache: Any, prompt: Prompt) -> Score:
    """The questions one after the other, each behind the prompt alone: `crop` takes the one before away."""
    for part in prompt.context.split(CHUNK):
        model(input_ids=part[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    answered, log_p, ranks = 0, [], []
    for question, number in prompt.questions:
        found = log_probabilities(model, cache, torch.cat((question, number)))
        cache.crop(-len(question) - len(number))
        found = found[len(question) - 1 : -1]
        its = found.gather(1, number[:, None])
        rank = 1 + (~(found <= its)).sum(-1)  # a NaN is not below it, so the rank is the vocabulary's size
        answered += int((rank == 1).all())
        log_p.append(its[:, 0])
        ranks.append(rank)
    return Score(
        answered / len(prompt.questions),
        float(torch.cat(log_p).double().mean().exp()),
        float(torch.cat(ranks).double().mean()),
    )


def needle_table(
    model: Any,
    tokenizer: Any,
    text: str,
    plan: KVPlan,
    lengths: list[int],
    depths: list[float],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Cell]:
    """A cell for every length and depth. CalibrationError for a text or length that is too short, KVError where the
    model cannot have the cache."""
    haystack = tokenize(tokenizer, text)
    plan = with_orders(plan, model, packed_layers(model.config))
    prompts = [(n, depth, prompt_of(tokenizer, haystack, n, depth)) for n in lengths for depth in depths]
    cells = []
    with reading_packed(model):
        for length, depth, prompt in prompts:
            dense = score(model, DynamicCache(config=model.config), prompt)
            packed = score(model, QuantizedCache(model.config, plan, tokens=length), prompt)
            cells.append(Cell(length, depth, dense, packed))
            progress(len(cells), len(prompts))
    return cells
