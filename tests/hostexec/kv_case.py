"""A cache with random tokens for the kernels of it on the host executor, and its attention in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpalette.quant.kv_token import decode, encode, pack, packed_bytes, rotate

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
SOURCES = [*sorted(CUDA.glob("kv_attention*.cu")), HERE / "kv_attention_entry.cpp"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PAGE = 64
LIMIT = 99 * 1024


@dataclass(frozen=True)
class Shape:
    """lengths: tokens in pages of each row. sinks, window: slots of 16-bit tokens; fresh: new tokens are there too."""

    bits_k: int = 4
    bits_v: int = 4
    head_dim: int = 64
    head_dim_v: int = 0
    kv_heads: int = 2
    group: int = 4
    tokens: int = 1
    lengths: tuple[int, ...] = (200,)
    sinks: int = 4
    window: int = 10
    fresh: bool = True
    dtype: torch.dtype = torch.float16
    q_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    sliding_window: int = 0
    start: tuple[int, ...] = ()
    sink_logits: bool = False
    rotated: bool = True
    splits: int = 3
    dense_splits: int = 1


def hartley(width: int) -> Tensor | None:
    """float32 [p, p] of the odd part of width; None where that is 1."""
    odd = width // (width & -width)
    angle = 2 * math.pi / odd * (torch.outer(torch.arange(odd), torch.arange(odd)) % odd).double()
    return ((angle.cos() + angle.sin()) / math.sqrt(odd)).float() if odd > 1 else None


class Cache:
    """The tensors of a call; `want` [batch, heads, n, Dv] float64."""

    def __init__(self, s: Shape, seed: int = 0) -> None:
        self.shape = s
        self.g = torch.Generator().manual_seed(seed + 1000 * s.bits_k + 100 * s.bits_v + s.head_dim)
        self.batch, self.width_v = len(s.lengths), s.head_dim_v or s.head_dim
        self.table_row = max(-(-max(s.lengths) // PAGE), 0)
        self.pages = self.batch * self.table_row + 2
        order = torch.randperm(self.pages, generator=self.g)[: self.batch * self.table_row]
        self.table = order.view(self.batch, self.table_row).int()
        self.k_codes, self.k_gain, self.k = self._side(s.bits_k, s.head_dim, True, 1.0)
        self.v_codes, self.v_gain, self.v = self._side(s.bits_v, self.width_v, False, 0.02)
        self.lengths = torch.tensor(s.lengths, dtype=torch.int32)
        self.sinks = self._piece(s.sinks, [s.sinks if n else min(3, s.sinks) for n in s.lengths])
        self.window = self._piece(s.window, [s.window if n else 0 for n in s.lengths])
        self.first = torch.randint(0, max(s.window, 1), (self.batch,), generator=self.g).int()
        self.fresh = self._piece(s.tokens, [s.tokens] * self.batch) if s.fresh else None
        heads = s.kv_heads * s.group
        self.q = self._random(self.batch, heads, s.tokens, s.head_dim).to(s.q_dtype)
        self.logits = self._random(heads) if s.sink_logits else None
        self.start = torch.tensor(s.start, dtype=torch.int32) if s.start else None

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.g)

    def _side(self, bits: int, width: int, unbiased: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and gains of the pages, and decoded tokens [batch, table tokens, kv_heads, D]. Beyond a row's tokens
        rubbish and NaN."""
        s, tokens = self.shape, self.table_row * PAGE
        codes = torch.randint(0, 256, (self.pages, s.kv_heads, PAGE, packed_bytes(width, bits)), generator=self.g)
        codes = codes.to(torch.uint8)
        gain = torch.full((self.pages, s.kv_heads, PAGE), math.nan, dtype=torch.float16)
        decoded = torch.zeros(self.batch, tokens, s.kv_heads, width, dtype=torch.float64)
        for row, n in enumerate(s.lengths):
            if n == 0:
                continue
            size = torch.exp(self._random(n, s.kv_heads, 1) * (0.2 if unbiased else 1)) * scale
            c, gains = encode(self._random(n, s.kv_heads, width) * size, bits, unbiased)
            t = torch.arange(n)
            page, slot = self.table[row].long()[t // PAGE], t % PAGE
            codes[page, :, slot], gain[page, :, slot] = pack(c, bits), gains
            decoded[row, :n] = decode(c, gains, bits).double()
        return codes, gain, decoded

    def _piece(self, slots: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        s = self.shape
        if slots == 0:
            return None
        k, v = (self._random(self.batch, slots, s.kv_heads, w).to(s.dtype) for w in (s.head_dim, self.width_v))
        return k, v * 0.02, torch.tensor(lengths, dtype=torch.int32)

    def row(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values float64 [tokens, kv_heads, D] of a row, in the order of their positions."""
        k, v = [], []
        for piece in ("sinks", "pages", "window", "fresh"):
            if piece == "pages":
                n = self.shape.lengths[b]
                k.append(self.k[b, :n])
                v.append(self.v[b, :n])
                continue
            found = getattr(self, piece)
            if found is None:
                continue
            n = int(found[2][b])
            at = torch.arange(n)
            if piece == "window":
                at = (at + int(self.first[b])) % self.shape.window
            k.append(found[0][b, at].double())
            v.append(found[1][b, at].double())
        return torch.cat(k), torch.cat(v)

    def want(self) -> Tensor:
        s, outs = self.shape, []
        for b in range(self.batch):
            k, v = self.row(b)
            q = self.q[b].double()
            q = (q if s.rotated else rotate(q)).unflatten(0, (s.kv_heads, s.group))
            score = torch.einsum("hgnd,thd->hgnt", q, k) * s.head_dim**-0.5
            if s.softcap:
                score = s.softcap * torch.tanh(score / s.softcap)
            position = len(k) - s.tokens + torch.arange(s.tokens)[:, None]
            behind = position - torch.arange(len(k))
            seen = (behind >= 0) & (torch.arange(len(k)) >= (int(self.start[b]) if self.start is not None else 0))
            if s.sliding_window:
                seen &= behind < s.sliding_window
            weight = torch.where(seen, score, -math.inf).exp()
            total = weight.sum(-1, keepdim=True)
            if self.logits is not None:
                total = total + self.logits.double().view(s.kv_heads, s.group, 1, 1).exp()
            out = torch.einsum("hgnt,thd->hgnd", weight, v) / torch.where(total == 0, 1.0, total)
            outs.append((out if s.rotated else rotate(out)).flatten(0, 1))
        return torch.stack(outs)

    def arguments(self, guarded: Any) -> list[Any]:
        """Of run_kv_attention, but for the result and the parts."""
        s = self.shape
        pieces = [self.sinks, self.window, self.fresh]
        numbers = [s.bits_k, s.bits_v, self.table_row]
        for piece in pieces:
            strides = [0] * 7 if piece is None else [piece[0].shape[1], *piece[0].stride()[:3], *piece[1].stride()[:3]]
            numbers += strides
        numbers += [DTYPES[s.dtype], self.batch, s.kv_heads, s.group, s.tokens, s.head_dim, self.width_v]
        numbers += [s.sliding_window, DTYPES[s.q_dtype], DTYPES[s.out_dtype], not s.rotated, s.splits, s.dense_splits]
        reals = torch.tensor([s.head_dim**-0.5, s.softcap], dtype=torch.float32)
        found = [None if p is None else [guarded(t) for t in p] for p in pieces]
        sinks, window, fresh = (f or [None] * 3 for f in found)
        rest = [self.start, self.logits, hartley(s.head_dim), hartley(self.width_v), self.q]
        return [
            guarded(torch.tensor(numbers, dtype=torch.int64)),
            LIMIT,
            guarded(reals),
            *map(guarded, (self.k_codes, self.v_codes, self.k_gain, self.v_gain, self.table, self.lengths)),
            *sinks,
            *window,
            guarded(self.first),
            *fresh,
            *(None if t is None else guarded(t) for t in rest),
        ]

    def run(self, executor: Any, library: Any, options: Any = None) -> Tensor:
        """float64 [batch, heads, n, Dv] of the kernel."""
        s, guarded = self.shape, executor.guarded
        heads = s.kv_heads * s.group
        out = guarded(torch.full((self.batch, heads, s.tokens, self.width_v), math.nan, dtype=s.out_dtype))
        rows = s.group * s.tokens
        parts = torch.full((self.batch * s.kv_heads * s.splits * rows * (self.width_v + 2),), math.nan)
        library.call("run_kv_attention", *self.arguments(guarded), out, guarded(parts), options=options)
        result: Tensor = out.tensor.double()
        return result


def error(out: Tensor, want: Tensor) -> Tensor:
    """Relative, of each output vector; 0 where both are zero."""
    norm = want.norm(dim=-1)
    return (out - want).norm(dim=-1) / torch.where(norm == 0, 1.0, norm)
