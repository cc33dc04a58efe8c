"""Evaluating a model through its packed cache: `step` tokens a forward, so that every token behind the window is read
from packed bits, beside the same model with a dense cache and, where given, the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .kernels.kv_rows import cache_bytes
from .kv_attention import NAME
from .kv_cache import QuantizedCache
from .kv_load import packed_layers
from .kv_order import with_orders
from .quant.kv_format import KVError
from .quant.kv_plan import KVPlan

STEP = 16
"""Tokens of a forward: as many as native kernels read packed pages for."""


@dataclass(frozen=True)
class Divergence:
    """Mean KL(reference || model) in nats a token, its standard error over chunks, and how often both rank the same
    token first."""

    kl: float
    standard_error: float
    top1_agreement: float


@dataclass(frozen=True)
class CacheEvaluation:
    """perplexity: through the packed cache. dense_perplexity: of the same model with a dense cache, which `from_dense`
    compares with; `from_reference`: with the original. kl_packed: as from_dense.kl, over the positions alone that read
    packed tokens (NaN where none does).

    bytes: allocated for keys and values of packed layers, one row of the chunk's length; formula_bytes: what
    `cache_bytes` says; dense_bytes: of a dense cache of the same dtype. bits_per_element: of a quantized token, gains
    counted, mean over layers."""

    perplexity: float
    dense_perplexity: float
    from_dense: Divergence
    kl_packed: float
    reference_perplexity: float | None
    from_reference: Divergence | None
    bits_per_element: float
    bytes: int
    formula_bytes: int
    dense_bytes: int
    tokens: int
    step: int
    seconds: float


class _Against:
    """Sums of a model's distance from a reference, and the reference's own loss."""

    def __init__(self) -> None:
        self.chunks: list[list[Tensor]] = []
        self.loss, self.agree = 0.0, 0

    def add(self, log_p: Tensor, log_q: Tensor, following: Tensor) -> None:
        self.chunks[-1].append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64))
        self.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.loss += loss_of(log_p, following)

    def positions(self) -> Tensor:
        """float64 [chunks, seq_len]: KL of every position."""
        return torch.stack([torch.cat(parts) for parts in self.chunks])

    def result(self) -> Divergence:
        kl = self.positions()
        means = kl.mean(1)
        error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
        return Divergence(float(means.mean()), error, self.agree / kl.numel())


def loss_of(log_q: Tensor, following: Tensor) -> float:
    """Sum of -log q of the tokens int64 [m] that follow the first m positions of log_q [n, vocabulary], m <= n."""
    return -float(log_q[: len(following)].gather(1, following[:, None]).sum(dtype=torch.float64))


@torch.no_grad()
def evaluate_cache(
    model: Any,
    tokens: Tensor,
    plan: KVPlan,
    step: int = STEP,
    reference: Any = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CacheEvaluation:
    """Run tokens int64 [chunks, seq_len] through packed caches, a chunk at a time and `step` tokens a forward.

    KVError where the model cannot have the cache, or where it allocated other than the formula says.
    """
    if step < 1:
        raise KVError(f"a step of {step} tokens; give at least 1")
    start = time.monotonic()
    plan = with_orders(plan, model, packed_layers(model.config))
    from_dense, from_reference, loss, forwards = _Against(), _Against(), 0.0, 0
    cache = QuantizedCache(model.config, plan, tokens=tokens.shape[1])
    with reading_packed(model):
        for chunk in tokens:
            cache = QuantizedCache(model.config, plan, tokens=len(chunk))
            dense = DynamicCache(config=model.config)
            original = None if reference is None else DynamicCache(config=reference.config)
            from_dense.chunks.append([])
            from_reference.chunks.append([])
            for first in range(0, len(chunk), step):
                part, following = chunk[first : first + step], chunk[first + 1 : first + step + 1]
                log_q = log_probabilities(model, cache, part)
                loss += loss_of(log_q, following)
                from_dense.add(log_probabilities(model, dense, part), log_q, following)
                if reference is not None:
                    from_reference.add(log_probabilities(reference, original, part), log_q, following)
                forwards += 1
                progress(forwards, len(tokens) * -(-len(chunk) // step))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    allocated, formula, dense_bytes = check_memory(cache, tokens.shape[1])
    exact = max(layer.form.sinks + layer.form.window for layer in cache.packed)
    widths = [layer.form.bits_per_element(layer.rows.head_dim, layer.rows.head_dim_v) for layer in cache.packed]
    return CacheEvaluation(
        perplexity=_exp(loss / predicted),
        dense_perplexity=_exp(from_dense.loss / predicted),
        from_dense=from_dense.result(),
        kl_packed=float(from_dense.positions()[:, exact + step :].mean()),
        reference_perplexity=None if reference is None else _exp(from_reference.loss / predicted),
        from_reference=None if reference is None else from_reference.result(),
        bits_per_element=sum(widths) / len(widths),
        bytes=allocated,
        formula_bytes=formula,
        dense_bytes=dense_bytes,
        tokens=tokens.numel(),
        step=step,
        seconds=time.monotonic() - start,
    )


@contextmanager
def reading_packed(model: Any) -> Iterator[None]:
    """Attention that reads packed caches, and dense ones as `sdpa` does, within the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def log_probabilities(model: Any, cache: Any, part: Tensor) -> Tensor:
    """float32 [n, vocabulary], on the CPU, of the tokens int64 [n] behind what `cache` holds; they are appended."""
    logits = model(input_ids=part[None].to(model.device), past_key_values=cache, use_cache=True).logits[0]
    return logits.float().log_softmax(-1).cpu()


def check_memory(cache: QuantizedCache, tokens: int) -> tuple[int, int, int]:
    """(allocated, formula, dense) bytes of the packed layers of a cache reserved for and filled with `tokens`.
    KVError where the first two differ."""
    allocated = formula = dense = 0
    for layer in cache.packed:
        layer.commit()
        rows = layer.rows
        shape = (rows.batch, rows.kv_heads, rows.head_dim, rows.head_dim_v, rows.dtype.itemsize)
        allocated += layer.nbytes
        formula += cache_bytes(rows.form, tokens, *shape, rollback=layer.rollback)
        dense += rows.batch * tokens * rows.kv_heads * (rows.head_dim + rows.head_dim_v) * rows.dtype.itemsize
    if allocated != formula:
        raise KVError(f"the cache of {tokens} tokens allocated {allocated} bytes, the formula says {formula}")
    return allocated, formula, dense


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())
