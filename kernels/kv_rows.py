"""The cached keys and values of one layer for a batch of rows, each with a length of its own.

A row's tokens are counted from its first real one: padding is not stored. Of a row of L tokens,

    [ sinks | pages: quantized, 64 tokens each         | window ]
      0..S    S .. max(L - window, first exact one)      .. L

sinks and window are rows [tokens, kv_heads, D] of the model's dtype in the form that is quantized later: keys centered
and rotated, values rotated, so that one query serves all three (a side of 16 bits is left as it is). The window is a
ring: token t stands in slot t % capacity. Every token is quantized once, when it leaves the window. The ring may hold
more than the window (`rollback`): tokens that are already quantized but come back into the window after a `crop`.
"""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import PAGE, KVError, KVFormat
from ..quant.kv_token import rotate
from .kv_pages import Encoder, PagePool, page_bytes

Ints = NDArray[np.int64]


@runtime_checkable
class RowEncoder(Protocol):
    """An encoder that does the work of a step in one call: beside it a step of Python costs more than the tokens."""

    def store(self, rows: KVRows, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What `KVRows.stored` gives."""

    def append_rows(self, rows: KVRows, k: Tensor, v: Tensor, skip: Ints | None) -> bool:
        """What `KVRows.append` does, state included; False, and nothing done, where tokens have no claimed pages."""


class KVRows:
    """mean: float32 [kv_heads, D] that keys are centered with, or None. rollback: tokens that `crop` can take away and
    leave the window as it was; past them the window starts with fewer tokens than it has room for. encoder: rotates
    and encodes, bit for bit as `quant/kv_token.py`, which does it where there is none."""

    def __init__(
        self,
        form: KVFormat,
        batch: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device,
        mean: Tensor | None = None,
        rollback: int = 0,
        encoder: Encoder | None = None,
    ) -> None:
        if not self.holds(form):
            raise KVError(f"{type(self).__name__} does not hold {form}; kv_group_rows.rows_class says what does")
        if mean is not None and tuple(mean.shape) != (kv_heads, head_dim):
            raise KVError(f"a mean {list(mean.shape)} does not fit keys of {[kv_heads, head_dim]} [kv_heads, head_dim]")
        self.form, self.dtype, self.device = form, dtype, device
        self.kv_heads, self.head_dim, self.head_dim_v = kv_heads, head_dim, head_dim_v
        self.mean = None if mean is None else mean.to(device, torch.float32).contiguous()
        self.encoder = encoder
        self.row_encoder: RowEncoder | None = encoder if isinstance(encoder, RowEncoder) else None
        self.pool = self._pool()
        self.pool.watchers.add(self)
        self.lengths: Ints = np.zeros(batch, np.int64)
        self.quantized: Ints = np.full(batch, form.sinks, np.int64)  # tokens S..quantized-1 are in pages
        self.exact_from: Ints = np.zeros(batch, np.int64)  # the ring holds tokens exact_from..length-1
        self.claimed: Ints = np.full(batch, form.sinks, np.int64)  # tokens quantized..claimed-1 have pages of their own
        self.native: tuple[object, ...] | None = None
        """What native code is told of this object, as long as no tensor or array of it is replaced."""
        self.table: list[list[int]] = [[] for _ in range(batch)]
        self._block_table: Tensor | None = None

        def room(tokens: int) -> tuple[Tensor, Tensor]:
            shapes = ((batch, tokens, kv_heads, width) for width in (head_dim, head_dim_v))
            k, v = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            return k, v

        self.sink_k, self.sink_v = room(form.sinks)
        self.ring_k, self.ring_v = room(ring_tokens(form, rollback))

    @staticmethod
    def holds(form: KVFormat) -> bool:
        return form.kind == "token"

    def _pool(self) -> PagePool:
        return PagePool(self.form, self.kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.device)

    def __getstate__(self) -> dict[str, object]:
        """Of a copy, whose tensors are elsewhere."""
        return {**vars(self), "native": None}

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens of the ring."""
        return self.ring_k.shape[1]

    @property
    def exact_start(self) -> Ints:
        """[batch]: tokens from here on are read from the ring; before it and after the sinks, from pages."""
        start = np.maximum(self._packed_until(self.lengths), self.exact_from)
        return np.minimum(np.maximum(start, self.form.sinks), np.maximum(self.lengths, self.form.sinks))

    @property
    def block_table(self) -> Tensor:
        """int32 [batch, most pages of a row]; -1 beyond a row's pages."""
        if self._block_table is None:
            most = max((len(pages) for pages in self.table), default=0)
            padded = [pages + [-1] * (most - len(pages)) for pages in self.table]
            table = torch.tensor(padded, dtype=torch.int32, device=self.device)
            self._block_table = table.reshape(self.batch, most)
        return self._block_table

    @property
    def nbytes(self) -> int:
        """Bytes allocated for pages, sinks and ring."""
        exact = (self.sink_k, self.sink_v, self.ring_k, self.ring_v)
        return self.pool.nbytes + sum(t.numel() * t.element_size() for t in exact)

    def _packed_until(self, lengths: Ints) -> Ints:
        """The first token of the window of rows so long; may be before the sinks' end."""
        return lengths - self.form.window

    def rotated_query(self, q: Tensor) -> Tensor:
        """q [batch, heads, n, D] in the basis of the stored keys."""
        return rotate(q) if self.form.bits_k < 16 else q

    def rotated_back(self, out: Tensor) -> Tensor:
        """Sums [batch, heads, n, Dv] of stored values as the model's values."""
        return rotate(out) if self.form.bits_v < 16 else out

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, kv_heads, n, D] -> [batch, n, kv_heads, D] in the form and dtype that sinks and window hold."""
        if self.row_encoder is not None:
            return self.row_encoder.store(self, key, value)
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        if self.form.bits_k < 16:
            k = self._rotate(k, self.mean)
        if self.form.bits_v < 16:
            v = self._rotate(v, None)
        return k.to(self.dtype), v.to(self.dtype)

    def _rotate(self, x: Tensor, mean: Tensor | None) -> Tensor:
        if self.encoder is not None:
            return self.encoder.rotate(x, self.dtype, mean)
        return rotate(x.float() if mean is None else x.float() - mean)

    def append(self, k: Tensor, v: Tensor, skip: Ints) -> None:
        """n tokens more of every row, k [batch, n, kv_heads, D] of `stored`, less the first skip[b] (left padding)."""
        padding = skip if skip.any() else None
        if padding is not None and ((skip > 0) & (self.lengths > 0)).any():
            raise KVError(f"padding {skip.tolist()} after tokens {self.lengths.tolist()}; pad on the left")
        if self.row_encoder is not None and self.row_encoder.append_rows(self, k, v, padding):
            return
        new = self.lengths + k.shape[1] - skip
        until = np.maximum(self.quantized, self._packed_until(new))
        self._claim(until)
        if self.row_encoder is not None:
            if not self.row_encoder.append_rows(self, k, v, padding):
                raise AssertionError(f"pages are claimed up to {self.claimed.tolist()}, {until.tolist()} are needed")
            return
        self._append(k, v, skip, new, until)
        self.lengths, self.quantized = new, until
        self.exact_from = np.maximum(self.exact_from, new - self.capacity)

    def _claim(self, until: Ints) -> None:
        """Pages of their own for tokens quantized..until-1 of every row."""
        for row, (first, last) in enumerate(zip(self.quantized.tolist(), until.tolist(), strict=True)):
            if first >= last:
                continue
            pages, page = self.table[row], (first - self.form.sinks) // PAGE
            if page < len(pages) and self.pool.users[pages[page]] > 1:
                pages[page] = self.pool.own(pages[page])
            if missing := (last - 1 - self.form.sinks) // PAGE + 1 - len(pages):
                pages += self.pool.take(missing)
            self.claimed[row] = self.form.sinks + len(pages) * PAGE
        self._changed()

    def _changed(self) -> None:
        """Tensors, arrays or the table of pages are others now."""
        self._block_table, self.native = None, None

    def _append(self, k: Tensor, v: Tensor, skip: Ints, new: Ints, until: Ints) -> None:
        old = self.lengths
        row, token = _ranges(self.quantized, until)
        if len(row):
            fresh = token >= old[row]
            page, slot = np.divmod(token - self.form.sinks, PAGE)
            ids = np.array([self.table[r][p] for r, p in zip(row, page, strict=True)], np.int64)
            slots = self._at(ids * PAGE + slot)
            self.pool.keys.write(slots, self._gather(row, token, fresh, self.ring_k, k, skip), self.encoder)
            self.pool.values.write(slots, self._gather(row, token, fresh, self.ring_v, v, skip), self.encoder)
        for k_out, v_out, first, last, slots_of in (
            (self.sink_k, self.sink_v, old, np.minimum(new, self.form.sinks), self.form.sinks),
            (self.ring_k, self.ring_v, np.maximum(old, new - self.capacity), new, self.capacity),
        ):
            row, token = _ranges(first, last)
            if len(row):
                to, source = self._index(row, token % slots_of), self._index(row, token - old[row] + skip[row])
                k_out[to], v_out[to] = k[source], v[source]

    def _gather(self, row: Ints, token: Ints, fresh: NDArray[np.bool_], ring: Tensor, x: Tensor, skip: Ints) -> Tensor:
        """[tokens, kv_heads, D]: of x [batch, n, ..] where fresh, of the ring elsewhere."""
        out = ring.new_empty(len(row), *ring.shape[2:])
        if not fresh.all():
            out[self._at(~fresh)] = ring[self._index(row[~fresh], token[~fresh] % self.capacity)]
        if fresh.any():
            row, token = row[fresh], token[fresh]
            out[self._at(fresh)] = x[self._index(row, token - self.lengths[row] + skip[row])]
        return out

    def crop(self, tokens: int) -> None:
        """The last `tokens` of every row less; a row that has fewer is empty then."""
        self.lengths = np.maximum(self.lengths - tokens, 0)
        self.quantized = np.maximum(np.minimum(self.quantized, self.lengths), self.form.sinks)
        self.exact_from = np.minimum(self.exact_from, self.lengths)
        for pages, quantized in zip(self.table, self.quantized, strict=True):
            used = -(-(int(quantized) - self.form.sinks) // PAGE)
            self.pool.drop(pages[used:])
            del pages[used:]
        self.claimed = self.quantized.copy()  # pages may be shared since they were claimed
        self._changed()

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; int64 [new batch], repeats allowed. Pages are shared, not copied."""
        index = rows.to("cpu", torch.int64)
        old, at = self.table, index.numpy()
        self.table = [list(old[i]) for i in at]
        for pages in self.table:
            self.pool.share(pages)
        for pages in old:
            self.pool.drop(pages)
        self.lengths, self.quantized, self.exact_from = self.lengths[at], self.quantized[at], self.exact_from[at]
        index = index.to(self.device)
        self.sink_k, self.sink_v = self.sink_k[index], self.sink_v[index]
        self.ring_k, self.ring_v = self.ring_k[index], self.ring_v[index]
        self.claimed = self.quantized.copy()  # a page that is shared has to be copied first
        self._changed()

    def fork(self) -> KVRows:
        """Rows with the same tokens. Pages are shared, not copied, until one of the two writes to them."""
        other = copy.copy(self)
        other.table = [list(pages) for pages in self.table]
        for pages in other.table:
            self.pool.share(pages)
        for name in ("lengths", "quantized", "exact_from"):
            setattr(other, name, getattr(self, name).copy())
        for name in ("sink_k", "sink_v", "ring_k", "ring_v"):
            setattr(other, name, getattr(self, name).clone())
        for rows in (self, other):  # a page that is shared has to be copied first
            rows.claimed = rows.quantized.copy()
            rows._changed()
            self.pool.watchers.add(rows)
        return other

    def pages_moved(self) -> None:
        """The pool has other tensors now."""
        self.native = None

    def __del__(self) -> None:  # a fork that is gone needs its pages no more
        for pages in getattr(self, "table", ()):
            self.pool.drop(pages)

    def repeat(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """No tokens; the memory stays."""
        self.crop(int(self.lengths.max(initial=0)))

    def reserve(self, tokens: int) -> None:
        """Pages for rows of so many tokens, so that none are allocated on the way."""
        self.pool.reserve(self.batch * pages_of(self.form, tokens))
        self._changed()

    def grow_rollback(self, rollback: int) -> None:
        """A ring that `crop` can go back `rollback` tokens in, from the tokens that are still to come on."""
        capacity = ring_tokens(self.form, rollback)
        if capacity <= self.capacity:
            return
        row, token = _ranges(self.exact_from, self.lengths)
        source, to = self._index(row, token % max(self.capacity, 1)), self._index(row, token % capacity)
        rings = []
        for ring in (self.ring_k, self.ring_v):
            grown = ring.new_zeros(ring.shape[0], capacity, *ring.shape[2:])
            if len(row):
                grown[to] = ring[source]
            rings.append(grown)
        self.ring_k, self.ring_v = rings
        self._changed()

    def window_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """(k, v [batch, t, kv_heads, D], token int64 [batch, t], -1 where a row has none), from exact_start on."""
        start = self.exact_start
        most = int((self.lengths - start).max(initial=0))
        token = start[:, None] + np.arange(most)
        valid = token < self.lengths[:, None]
        at = self._index(np.arange(self.batch)[:, None], token % max(self.capacity, 1))
        return self.ring_k[at], self.ring_v[at], self._at(np.where(valid, token, -1))

    def _at(self, index: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(index).to(self.device)

    def _index(self, row: Ints, token: Ints) -> tuple[Tensor, Tensor]:
        return self._at(row), self._at(token)


def _ranges(first: Ints, until: Ints) -> tuple[Ints, Ints]:
    """(row, token) of all first[row] <= token < until[row], row by row."""
    count = np.maximum(until - first, 0)
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[row]


def ring_tokens(form: KVFormat, rollback: int = 0) -> int:
    """Slots of the ring: the window, and what waits for the rest of its group."""
    return form.window + form.token_group - 1 + rollback


def pages_of(form: KVFormat, tokens: int) -> int:
    """Pages of a row of so many tokens."""
    return max(0, -(-(tokens - form.sinks - form.window) // PAGE))


def cache_bytes(
    form: KVFormat,
    tokens: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    itemsize: int = 2,
    rollback: int = 0,
) -> int:
    """Bytes of a layer's cache after `KVRows.reserve(tokens)`: what is allocated. itemsize: of the model's dtype."""
    width = head_dim + (head_dim if head_dim_v is None else head_dim_v)
    exact = batch * (form.sinks + ring_tokens(form, rollback)) * kv_heads * width * itemsize
    return exact + batch * pages_of(form, tokens) * page_bytes(form, kv_heads, head_dim, width - head_dim, itemsize)
