"""A pool of pages of 64 tokens: the quantized keys and values of one layer.

    k_codes uint8 [pages, kv_heads, 64, D bits / 8]     k_gain fp16 [pages, kv_heads, 64]     v_codes, v_gain likewise

A side of 16 bits has codes of the model's dtype [pages, kv_heads, 64, D] and no gain. Rows of a batch own pages
through a block table; a page that several rows share (beams, a repeated prompt) is copied before one of them writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..quant.kv_format import PAGE, KVFormat
from ..quant.kv_token import decode, encode, pack, packed_bytes, unpack

GROWTH = 16
"""The pool grows by a sixteenth: at 8000 tokens of 2 bits an eighth would already cost more than the window does."""


class Encoder(Protocol):
    """What rotates and encodes tokens bit for bit as `quant/kv_token.py`, and faster."""

    def append(self, x: Tensor, slots: Tensor, codes: Tensor, gain: Tensor, bits: int, unbiased: bool) -> None:
        """x [n, kv_heads, D], rotated, into slots int64 [n] (page * 64 + token of the page) of codes and gain."""

    def rotate(self, x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
        """`kv_token.rotate` of x - mean, as `dtype`; None: that of x."""


class Side:
    """Keys or values of all pages."""

    def __init__(
        self, bits: int, kv_heads: int, head_dim: int, unbiased: bool, dtype: torch.dtype, device: torch.device
    ):
        self.bits, self.head_dim, self.unbiased = bits, head_dim, unbiased
        row, row_dtype = (head_dim, dtype) if bits == 16 else (packed_bytes(head_dim, bits), torch.uint8)
        self.codes = torch.zeros(0, kv_heads, PAGE, row, dtype=row_dtype, device=device)
        self.gain = None if bits == 16 else torch.zeros(0, kv_heads, PAGE, dtype=torch.float16, device=device)

    @classmethod
    def over(cls, codes: Tensor, gain: Tensor | None, bits: int, head_dim: int, unbiased: bool) -> Side:
        """These tensors, as they are."""
        side = cls.__new__(cls)
        side.bits, side.head_dim, side.unbiased, side.codes, side.gain = bits, head_dim, unbiased, codes, gain
        return side

    def tensors(self) -> list[Tensor]:
        return [self.codes] if self.gain is None else [self.codes, self.gain]

    def to(self, device: torch.device) -> None:
        """Copies that the host does not wait for."""
        self.codes = self.codes.to(device, non_blocking=True)
        self.gain = None if self.gain is None else self.gain.to(device, non_blocking=True)

    def resize(self, pages: int) -> None:
        """Room for `pages`; what is there stays, what is new is zero."""

        def grown(t: Tensor) -> Tensor:
            out = t.new_zeros(pages, *t.shape[1:])
            out[: len(t)] = t
            return out

        self.codes = grown(self.codes)
        self.gain = None if self.gain is None else grown(self.gain)

    def write(self, slots: Tensor, x: Tensor, encoder: Encoder | None = None) -> None:
        """x [tokens, kv_heads, D], as stored rows are (`kv_rows`), quantized into slots[i] = page * 64 + its token."""
        if self.gain is not None and encoder is not None:
            encoder.append(x, slots, self.codes, self.gain, self.bits, self.unbiased)
            return
        pages, slots = slots // PAGE, slots % PAGE
        if self.gain is None:
            self.codes[pages, :, slots] = x
            return
        codes, gain = encode(x, self.bits, self.unbiased)
        self.codes[pages, :, slots] = pack(codes, self.bits)
        self.gain[pages, :, slots] = gain

    def read(self, pages: Tensor) -> Tensor:
        """Pages int64 [rows, n] decoded: [rows, kv_heads, n * 64, D], float32 (16 bits: the model's dtype)."""
        x = self.codes[pages] if self.gain is None else unpack(self.codes[pages], self.bits)
        if self.gain is not None:
            x = decode(x, self.gain[pages], self.bits)
        return x.transpose(1, 2).flatten(2, 3)  # [rows, n, kv_heads, 64, D] before


def page_bytes(form: KVFormat, kv_heads: int, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Bytes of one page. itemsize: of the model's dtype, for sides of 16 bits."""
    rows = [
        width * itemsize if bits == 16 else form.row_bytes(bits, width)
        for bits, width in ((form.bits_k, head_dim), (form.bits_v, head_dim_v))
    ]
    return int(PAGE * kv_heads * sum(rows))


class Watcher(Protocol):
    """Keeps addresses of a pool's tensors."""

    def pages_moved(self) -> None: ...


class PagePool:
    """The pages of a layer and who uses them."""

    def __init__(
        self,
        form: KVFormat,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device,
        sides: tuple[Side, Side] | None = None,
    ) -> None:
        """sides: keys and values of another kind than "token"."""
        form.check_head_dim(head_dim, head_dim_v)
        if sides is None:
            keys = Side(form.bits_k, kv_heads, head_dim, True, dtype, device)
            sides = keys, Side(form.bits_v, kv_heads, head_dim_v, False, dtype, device)
        self.keys, self.values = sides
        self.device = device
        self.watchers: WeakSet[Watcher] = WeakSet()
        self.away = False  # on the CPU, until they are needed
        self.users: list[int] = []  # of every page
        self.free: list[int] = []

    @classmethod
    def over(cls, keys: Side, values: Side) -> PagePool:
        """These pages, all of them in use."""
        pool = cls.__new__(cls)
        pool.keys, pool.values, pool.device, pool.away = keys, values, keys.codes.device, False
        pool.users, pool.free, pool.watchers = [1] * len(keys.codes), [], WeakSet()
        return pool

    @property
    def pages(self) -> int:
        return len(self.users)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return self.keys.tensors() + self.values.tensors()

    def offload(self) -> None:
        """All pages to the CPU."""
        if not self.away:
            self.away = True
            for side in (self.keys, self.values):
                side.to(torch.device("cpu"))
            self._moved()

    def fetch(self) -> None:
        """All pages back to their device."""
        if self.away:
            self.away = False
            for side in (self.keys, self.values):
                side.to(self.device)
            self._moved()

    def _moved(self) -> None:
        for watcher in self.watchers:
            watcher.pages_moved()

    def reserve(self, pages: int) -> None:
        """Room for `pages` in all, exactly."""
        if pages > self.pages:
            self.keys.resize(pages)
            self.values.resize(pages)
            self._moved()
            self.free = [*range(pages - 1, self.pages - 1, -1), *self.free]
            self.users += [0] * (pages - self.pages)

    def take(self, pages: int) -> list[int]:
        """Free pages, zeroed: what is read beyond the tokens of a page must not be a stale NaN."""
        if pages > len(self.free):
            self.reserve(max(self.pages + pages - len(self.free), self.pages + self.pages // GROWTH))
        taken = [self.free.pop() for _ in range(pages)]
        for page in taken:
            self.users[page] = 1
            for t in self._tensors():
                t[page] = 0
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One user more of each."""
        for page in pages:
            self.users[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One user less of each; pages without any are free."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    def own(self, page: int) -> int:
        """This page where the caller is its only user, else a copy that is the caller's."""
        if self.users[page] == 1:
            return page
        (copy,) = self.take(1)
        for t in self._tensors():
            t[copy] = t[page]
        self.drop([page])
        return copy
