"""How close a checkpoint is to its original: perplexity, KL divergence, top-1 agreement.

Protocol: the text as it is, tokenised without special tokens, the first `chunks` non-overlapping chunks of `seq_len`;
KL(reference || quantized) in nats per token, over all positions, sum(p * (log p - log q)) in float64 accumulation. The
reference is computed in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .text import CalibrationError, tokenize


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log likelihood of the next token. kl_divergence: nats per token.
    top1_agreement: share of positions where both models rank the same token first. None without a reference."""

    perplexity: float
    tokens: int
    seconds: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    kl_standard_error: float | None = None
    top1_agreement: float | None = None


def chunks_of(tokenizer: Any, text: str, seq_len: int, chunks: int) -> Tensor:
    """int64 [chunks, seq_len], the first of the text. CalibrationError where it has fewer."""
    ids = tokenize(tokenizer, text)
    if len(ids) < seq_len * chunks:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, {chunks} chunks of {seq_len} need {seq_len * chunks}; "
            "give a longer text"
            + (f" or --chunks {len(ids) // seq_len}" if len(ids) >= seq_len else ", or shorter chunks (--seq-len)")
        )
    return ids[: seq_len * chunks].view(chunks, seq_len)


@torch.no_grad()
def evaluate(
    model: Any, tokens: Tensor, reference: Any = None, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Run `model` (and `reference`) over tokens int64 [chunks, seq_len], a chunk at a time."""
    start = time.monotonic()
    loss = reference_loss = 0.0
    agree = 0
    divergences: list[float] = []
    for i, chunk in enumerate(tokens):
        log_q = _log_probabilities(model, chunk)
        loss += _loss(log_q, chunk)
        if reference is not None:
            log_p = _log_probabilities(reference, chunk)
            reference_loss += _loss(log_p, chunk)
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            divergences.append(_divergence(log_p, log_q) / len(chunk))
        progress(i + 1, len(tokens))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    result = Evaluation(_exp(loss / predicted), tokens.numel(), time.monotonic() - start)
    if reference is None:
        return result
    kl = torch.tensor(divergences, dtype=torch.float64, device="cpu")
    return Evaluation(
        perplexity=result.perplexity,
        tokens=result.tokens,
        seconds=time.monotonic() - start,
        reference_perplexity=_exp(reference_loss / predicted),
        kl_divergence=float(kl.mean()),
        kl_standard_error=float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
        top1_agreement=agree / tokens.numel(),
    )


def _log_probabilities(model: Any, chunk: Tensor) -> Tensor:
    """float32 [seq_len, vocabulary]."""
    logits = model(input_ids=chunk[None].to(model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def _loss(log_q: Tensor, chunk: Tensor) -> float:
    return -float(log_q[:-1].gather(1, chunk[1:, None].to(log_q.device)).sum(dtype=torch.float64))


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over positions. Row blocks keep the temporaries small."""
    total = 0.0
    for p, q in zip(log_p.split(64), log_q.split(64), strict=True):
        total += float((p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64))
    return total


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").exp())
