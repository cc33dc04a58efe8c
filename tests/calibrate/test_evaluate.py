"""Perplexity, KL divergence and agreement against plain computations."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.calibrate.evaluate import chunks_of, evaluate
from bitpalette.calibrate.text import CalibrationError


class Table:
    """A model whose logits are a table's row of the token, in any dtype."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache and input_ids.shape[0] == 1
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (3, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(11, 11, generator=generator)
    return p, p + 0.3 * torch.randn(11, 11, generator=generator)


def log_softmax(row: Tensor) -> list[float]:
    values = [float(v) for v in row]
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


def test_against_a_plain_computation(tokens: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    p, q = ([log_softmax(row) for row in table] for table in tables)
    loss_p, loss_q, kl, agree = [], [], [[] for _ in tokens], []
    for number, chunk in enumerate(tokens.tolist()):
        for here, following in itertools.pairwise(chunk):
            loss_p.append(-p[here][following])
            loss_q.append(-q[here][following])
        for here in chunk:
            kl[number].append(sum(math.exp(a) * (a - b) for a, b in zip(p[here], q[here], strict=True)))
            agree.append(p[here].index(max(p[here])) == q[here].index(max(q[here])))
    steps: list[tuple[int, int]] = []
    got = evaluate(Table(tables[1]), tokens, Table(tables[0]), lambda done, of: steps.append((done, of)))
    assert got.perplexity == pytest.approx(math.exp(sum(loss_q) / len(loss_q)), rel=1e-6)
    assert got.reference_perplexity == pytest.approx(math.exp(sum(loss_p) / len(loss_p)), rel=1e-6)
    means = [sum(chunk) / len(chunk) for chunk in kl]
    mean = sum(means) / 3
    assert got.kl_divergence == pytest.approx(mean, rel=1e-5)
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / 2 / 3)
    assert got.kl_standard_error == pytest.approx(error, rel=1e-4)
    assert got.top1_agreement == pytest.approx(sum(agree) / len(agree))
    assert 0 < got.top1_agreement < 1
    assert got.tokens == 210 and steps == [(1, 3), (2, 3), (3, 3)]


def test_a_model_against_itself(tokens: Tensor, tables: tuple[Tensor, Tensor], families: Any) -> None:
    for model in (Table(tables[0]), families["llama"]()):
        got = evaluate(model, tokens, model)
        assert abs(got.kl_divergence or 0) < 1e-6 and got.top1_agreement == 1
        assert got.perplexity == got.reference_perplexity


def test_without_a_reference(tokens: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    got = evaluate(Table(tables[0]), tokens)
    assert (got.kl_divergence, got.reference_perplexity, got.top1_agreement) == (None, None, None)
    assert got.perplexity == evaluate(Table(tables[0]), tokens, Table(tables[1])).perplexity


def test_one_chunk_has_no_standard_error(tokens: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    assert evaluate(Table(tables[0]), tokens[:1], Table(tables[1])).kl_standard_error == 0


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens(tokens: Tensor) -> None:
    assert evaluate(Table(torch.zeros(11, 11)), tokens).perplexity == pytest.approx(11)


def test_sixteen_bit_logits(tokens: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    """Probabilities are computed in float32 whatever the model computes in."""
    rounded = tables[0].bfloat16()
    got = evaluate(Table(rounded), tokens, Table(rounded.float()))
    assert abs(got.kl_divergence or 0) < 1e-6


class Letters:
    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_chunks() -> None:
    text = "".join(chr(i) for i in range(100))
    assert torch.equal(chunks_of(Letters(), text, 10, 3), torch.arange(30).view(3, 10))
    assert torch.equal(chunks_of(Letters(), text, 10, 10), torch.arange(100).view(10, 10))
    with pytest.raises(CalibrationError, match=r"100 tokens, 11 chunks of 10 need 110; .* --chunks 10$"):
        chunks_of(Letters(), text, 10, 11)
    with pytest.raises(CalibrationError, match="or shorter chunks"):
        chunks_of(Letters(), text, 101, 1)
