"""Attention over a cache of pages, sinks and window, in torch: what every kernel of it must compute.

One block of pages is decoded at a time and absorbed by online softmax (Milakov and Gimelshein, arXiv 1805.02867); the
history is never decoded as a whole.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import PAGE
from .kv_rows import KVRows

PAGES_AT_ONCE = 8
QUERIES_AT_ONCE = 256
"""Scores of one block: 256 queries by 512 tokens, 512 KiB a head."""


def attention(
    query: Tensor,
    rows: KVRows,
    new: tuple[Tensor, Tensor] | None,
    skip: NDArray[np.int64],
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """softmax(scaling q K^T) V for query [batch, heads, n, D], as the model computes it: `dtype` [batch, heads, n, Dv].

    new: keys and values of the n tokens of the queries, as `KVRows.stored` makes them, not yet appended; None where
    the last n tokens of `rows` are theirs. skip[b]: leading queries of a row that are padding; their output is zero.
    Query i sees its own token and those before it; sliding_window: at most so many, its own among them.
    softcap: scores become softcap * tanh(score / softcap). sink_logits [heads]: one more term of every denominator.
    """
    form, batch, n = rows.form, rows.batch, query.shape[2]
    q = rows.rotated_query(query.to(dtype)) * scaling
    total = rows.lengths + (0 if new is None else n - skip)
    position = torch.from_numpy(total[:, None] - n + np.arange(n)).to(query.device)  # negative: padding
    state = _Softmax(q.unflatten(1, (rows.kv_heads, -1)), position, rows.head_dim_v, softcap, sliding_window)

    token = torch.arange(form.sinks, device=query.device).expand(batch, -1)
    length = torch.from_numpy(rows.lengths).to(query.device)[:, None]
    state.absorb(_heads_first(rows.sink_k), _heads_first(rows.sink_v), torch.where(token < length, token, -1))
    exact_start = rows.exact_start
    table, until = rows.block_table, torch.from_numpy(exact_start).to(query.device)[:, None]
    for first in range(0, -(-(int(exact_start.max()) - form.sinks) // PAGE), PAGES_AT_ONCE):
        pages = table[:, first : first + PAGES_AT_ONCE].long()
        start = form.sinks + first * PAGE
        token = torch.arange(start, start + pages.shape[1] * PAGE, device=query.device).expand(batch, -1)
        token = torch.where(token < until, token, -1)
        pages = pages.clamp(min=0)
        state.absorb(rows.pool.keys.read(pages), rows.pool.values.read(pages), token)
    k, v, token = rows.window_tokens()
    state.absorb(_heads_first(k), _heads_first(v), token)
    if new is not None:
        state.absorb(_heads_first(new[0]), _heads_first(new[1]), position)
    out = state.result(sink_logits).flatten(1, 2)
    return rows.rotated_back(out)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


class _Softmax:
    """The running maximum, denominator and output of softmax over blocks of tokens. q [batch, kv_heads, g, n, D]."""

    def __init__(
        self, q: Tensor, position: Tensor, head_dim_v: int, softcap: float | None, sliding_window: int | None
    ) -> None:
        self.q, self.position, self.softcap, self.sliding_window = q, position, softcap, sliding_window
        self.most = q.new_full(q.shape[:-1], -math.inf)
        self.sum = q.new_zeros(q.shape[:-1])
        self.out = q.new_zeros(*q.shape[:-1], head_dim_v)

    def absorb(self, k: Tensor, v: Tensor, token: Tensor) -> None:
        """k, v [batch, kv_heads, t, D]; token int64 [batch, t]: the place of each in its row, negative: none."""
        there = token >= 0
        if not bool(there.any()):
            return
        # what is not there may be anything, and 0 * NaN is NaN
        k, v = (torch.where(there[:, None, :, None], x.to(self.q.dtype), 0.0) for x in (k, v))
        for first in range(0, self.q.shape[3], QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            behind = self.position[:, part, None] - token[:, None]  # [batch, queries, t]
            seen = there[:, None] & (behind >= 0)
            if self.sliding_window is not None:
                seen &= behind < self.sliding_window
            if bool(seen.any()):
                self._absorb(part, k, v, seen[:, None, None])

    def _absorb(self, part: slice, k: Tensor, v: Tensor, seen: Tensor) -> None:
        score = self.q[:, :, :, part] @ k[:, :, None].mT
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        score = torch.where(seen, score, -math.inf)
        before = self.most[:, :, :, part]
        most = torch.maximum(before, score.amax(-1))  # amax and maximum keep a NaN
        floor = torch.where(most == -math.inf, 0.0, most)  # nothing seen yet: exp(-inf - 0) = 0
        weight, decay = torch.exp(score - floor[..., None]), torch.exp(before - floor)
        self.most[:, :, :, part] = most
        self.sum[:, :, :, part] = self.sum[:, :, :, part] * decay + weight.sum(-1)
        self.out[:, :, :, part] = self.out[:, :, :, part] * decay[..., None] + weight @ v[:, :, None]

    def result(self, sink_logits: Tensor | None) -> Tensor:
        """[batch, kv_heads, g, n, Dv]; zero for a query that has seen nothing."""
        total = self.sum
        if sink_logits is not None:
            logit = sink_logits.to(total).view(*total.shape[1:3], 1)
            most = torch.maximum(self.most, logit)
            decay = torch.exp(self.most - most)
            self.out, total = self.out * decay[..., None], total * decay + torch.exp(logit - most)
        return self.out / torch.where(total == 0, 1.0, total)[..., None]
