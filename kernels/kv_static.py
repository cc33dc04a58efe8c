"""A layer's cache in tensors of fixed size, for torch.compile and CUDA graphs: its state, and attention over it and
appending to it as operators.

The parts are those of `kv_rows.py`; page j of row b is page b * P + j of the pool, and how many tokens a row has
stands in tensors. One forward is `attend` (state and new tokens), then `append`. On the CPU, for prompts and for the
reference, the operators read the lengths on the host and do what a growing cache does. For up to a kernel's
`most_tokens` on another device the host knows nothing: shapes are fixed, and a token that is not to be written has slot
-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import PAGE, KVError, KVFormat
from ..quant.kv_token import rotate
from .kv_kernel import REFERENCE, KVKernel, attention, kernels
from .kv_pages import PagePool, Side
from .kv_parts import Dense, Pages
from .kv_rows import KVRows, RowEncoder, pages_of


class StaticState(NamedTuple):
    """k_codes, v_codes [batch P, kv_heads, 64, ..] and k_gain, v_gain [batch P, kv_heads, 64] (of no elements for a
    side of 16 bits) as in `kv_pages`, sinks and rings [batch, tokens, kv_heads, D] as in `kv_rows`, block_table int32
    [batch, P], lengths, quantized and exact_from int64 [batch]."""

    k_codes: Tensor
    k_gain: Tensor
    v_codes: Tensor
    v_gain: Tensor
    sink_k: Tensor
    sink_v: Tensor
    ring_k: Tensor
    ring_v: Tensor
    block_table: Tensor
    lengths: Tensor
    quantized: Tensor
    exact_from: Tensor

    @staticmethod
    def allocate(
        form: KVFormat,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device,
        rollback: int = 0,
    ) -> StaticState:
        """Without tokens, with room for `tokens` of each row."""
        rows = KVRows(form, batch, kv_heads, head_dim, head_dim_v, dtype, device, rollback=rollback)
        pages = pages_of(form, tokens)
        rows.pool.reserve(batch * pages)
        keys, values = rows.pool.keys, rows.pool.values
        none = torch.zeros(0, dtype=torch.float16, device=device)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        quantized = torch.full((batch,), form.sinks, dtype=torch.int64, device=device)
        return StaticState(
            keys.codes,
            none if keys.gain is None else keys.gain,
            values.codes,
            none.clone() if values.gain is None else values.gain,
            rows.sink_k,
            rows.sink_v,
            rows.ring_k,
            rows.ring_v,
            table,
            torch.zeros_like(quantized),
            quantized,
            torch.zeros_like(quantized),
        )

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)

    def reset(self, form: KVFormat) -> None:
        """No tokens; the memory stays, and so do addresses."""
        self.lengths.zero_()
        self.quantized.fill_(form.sinks)
        self.exact_from.zero_()

    def crop(self, form: KVFormat, tokens: int) -> None:
        """The last `tokens` of every row less, in place; a row that has fewer is empty then."""
        self.lengths.sub_(tokens).clamp_(min=0)
        torch.minimum(self.quantized, self.lengths, out=self.quantized)
        self.quantized.clamp_(min=form.sinks)
        torch.minimum(self.exact_from, self.lengths, out=self.exact_from)

    def select(self, rows: Tensor) -> StaticState:
        """Row i becomes what row rows[i] was; in place where the number of rows stays. Pages are copied: a page of one
        row cannot be another's where tables are fixed."""
        rows = rows.to(self.lengths.device, torch.int64)
        tensors = {name: t for name, t in self._asdict().items() if name != "block_table"}
        chosen = {}
        for name, t in tensors.items():
            by_row = t if t.shape[0] in (0, self.batch) else t.view(self.batch, -1, *t.shape[1:])
            picked = by_row if t.shape[0] == 0 else by_row.index_select(0, rows)
            if len(rows) == self.batch:
                by_row.copy_(picked)
            else:
                chosen[name] = picked if t.shape[0] in (0, self.batch) else picked.flatten(0, 1)
        if not chosen:
            return self
        pages = self.block_table.shape[1]
        table = torch.arange(len(rows) * pages, dtype=torch.int32, device=rows.device).view(-1, pages)
        return StaticState(**chosen, block_table=table)

    def with_rollback(self, form: KVFormat, rollback: int) -> StaticState:
        """The same tokens with a longer ring."""
        rows = StaticRows(self, form, None)
        rows.grow_rollback(rollback)
        return self._replace(ring_k=rows.ring_k, ring_v=rows.ring_v)


class StaticRows(KVRows):
    """A state as `KVRows`, whose lengths the host reads."""

    def __init__(self, state: StaticState, form: KVFormat, kernel: KVKernel | None) -> None:
        self.form, self.dtype, self.device = form, state.sink_k.dtype, state.sink_k.device
        self.kv_heads, self.head_dim = state.ring_k.shape[2:]
        self.head_dim_v = state.ring_v.shape[3]
        self.mean, self.encoder, self.native = None, kernel, None
        self.row_encoder = kernel if isinstance(kernel, RowEncoder) else None
        gains = [gain if gain.numel() or bits < 16 else None for gain, bits in _gains(state, form)]
        self.pool = PagePool.over(
            Side.over(state.k_codes, gains[0], form.bits_k, self.head_dim, True),
            Side.over(state.v_codes, gains[1], form.bits_v, self.head_dim_v, False),
        )
        self.state = state
        self._block_table = state.block_table
        self.lengths, self.quantized, self.exact_from = (
            t.cpu().numpy() for t in (state.lengths, state.quantized, state.exact_from)
        )
        self.claimed = np.full_like(self.quantized, form.sinks + state.block_table.shape[1] * PAGE)
        self.sink_k, self.sink_v, self.ring_k, self.ring_v = state.sink_k, state.sink_v, state.ring_k, state.ring_v

    def __del__(self) -> None:  # pages are the state's
        pass

    @cached_property
    def table(self) -> list[list[int]]:  # type: ignore[override]
        return self.state.block_table.tolist()

    def _claim(self, until: NDArray[np.int64]) -> None:
        if (until > self.claimed).any():
            room = int(self.claimed[0]) + self.form.window
            raise KVError(f"{int(until.max()) + self.form.window} tokens in a static cache for {room}; say tokens=...")

    def write_back(self) -> None:
        """The state's lengths after `append`; on the CPU native code has written them there already."""
        for name in ("lengths", "quantized", "exact_from"):
            getattr(self.state, name).copy_(torch.from_numpy(getattr(self, name)))


def _gains(state: StaticState, form: KVFormat) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    return (state.k_gain, form.bits_k), (state.v_gain, form.bits_v)


def format_numbers(form: KVFormat) -> list[int]:
    """What operators are told of a format."""
    return [form.bits_k, form.bits_v, form.sinks, form.window]


def _format(numbers: Sequence[int]) -> KVFormat:
    bits_k, bits_v, sinks, window = numbers
    return KVFormat(bits_k, bits_v, sinks, window)


def _kernel(name: str) -> KVKernel | None:
    return None if name == REFERENCE else kernels()[name]


def _on_device(kernel: KVKernel | None, state: StaticState, tokens: int) -> bool:
    """The host is to know nothing of the lengths."""
    return kernel is not None and state.lengths.device.type != "cpu" and tokens <= kernel.most_tokens


def padding_on_host(mask: Tensor | None, lengths: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """[batch]: how many of the new tokens are padding. mask: uint8 [batch, 1, 1, any], 1 where a token is real, up to
    the last new one. KVError where it is not left padding of the tokens that the cache holds."""
    if mask is None:
        return np.zeros(len(lengths), np.int64)
    real = mask[:, 0, 0].cpu().numpy().astype(bool)
    count, start, place = real.sum(1), real.argmax(1), np.arange(real.shape[1])
    skip = lengths + tokens - count
    end = int((start + count).max(initial=0))
    if len(real) != len(lengths) or (real != ((place >= end - count[:, None]) & (place < end))).any():
        raise KVError(
            "the attention mask of a static cache is not left padding; pad on the left (tokenizer.padding_side = "
            "'left'), or use transformers' StaticCache"
        )
    if (skip < 0).any() or (skip > np.where(lengths > 0, 0, tokens)).any():
        raise KVError(
            f"the cache holds {lengths.tolist()} tokens and {tokens} came, the attention mask tells of "
            f"{count.tolist()}; pass the attention mask of all tokens in every forward"
        )
    return skip


def padding_on_device(mask: Tensor | None, lengths: Tensor, tokens: int) -> Tensor:
    """As `padding_on_host`, int64 [batch], unchecked: only a row without tokens can have padding."""
    if mask is None:
        return torch.zeros_like(lengths)
    skip = (tokens - mask[:, 0, 0].sum(-1, dtype=torch.int64)).clamp(0, tokens)
    return torch.where(lengths > 0, 0, skip)


def attend_on_device(
    kernel: KVKernel,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    skip: Tensor,
    state: StaticState,
    form: KVFormat,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """float32 [batch, heads, n, Dv]; nothing is read on the host. skip: `padding_on_device`."""
    n, capacity = k.shape[1], state.ring_k.shape[1]
    exact = torch.maximum(state.lengths - form.window, state.exact_from).clamp(min=form.sinks)
    exact = torch.minimum(exact, state.lengths.clamp(min=form.sinks))
    pages = Pages(
        state.k_codes,
        state.k_gain,
        state.v_codes,
        state.v_gain,
        form.bits_k,
        form.bits_v,
        state.block_table,
        (exact - form.sinks).int(),
    )
    sinks = Dense(state.sink_k, state.sink_v, state.lengths.clamp(max=form.sinks).int()) if form.sinks else None
    window = None
    if capacity:
        held = (state.lengths - exact).clamp(min=0).int()
        window = Dense(state.ring_k, state.ring_v, held, (exact % capacity).int())
    fresh = Dense(k, v, (n - skip).int(), skip.clamp(max=n - 1).int())
    out = kernel.attend(
        kernel.rotate(query, torch.float32),
        pages,
        sinks,
        window,
        fresh,
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
        sink_logits=sink_logits,
    )
    return kernel.rotate(out, torch.float32)


def append_on_device(kernel: KVKernel, k: Tensor, v: Tensor, skip: Tensor, state: StaticState, form: KVFormat) -> None:
    """n <= window + 1 tokens or any number more of every row, k, v [batch, n, kv_heads, D] as stored, less the first
    skip[b]; nothing is read on the host. Tokens beyond the room fail an assertion on the device."""
    n, capacity, pages = k.shape[1], state.ring_k.shape[1], state.block_table.shape[1]
    old = state.lengths
    new = old + n - skip
    until = torch.maximum(state.quantized, new - form.window)
    torch._assert_async((until <= form.sinks + pages * PAGE).all(), "more tokens than a static cache has room for")
    i = torch.arange(n, device=k.device)
    if pages:
        token = state.quantized[:, None] + i  # at most n leave the window
        page = state.block_table.gather(1, ((token - form.sinks) // PAGE).clamp(0, pages - 1)).long()
        slots = torch.where(token < until[:, None], page * PAGE + (token - form.sinks) % PAGE, -1)
        source = (token - old[:, None] + skip[:, None]).clamp(0, n - 1)
        fresh = (token >= old[:, None])[..., None, None]
        for x, ring, codes, gain, bits, unbiased in (
            (k, state.ring_k, state.k_codes, state.k_gain, form.bits_k, True),
            (v, state.ring_v, state.v_codes, state.v_gain, form.bits_v, False),
        ):
            leaving = _rows_at(x, source)
            if capacity:
                leaving = torch.where(fresh, leaving, _rows_at(ring, token % capacity))
            kernel.append(leaving.flatten(0, 1), slots.flatten(), codes, gain, bits, unbiased)
    if form.sinks:
        token = torch.arange(form.sinks, device=k.device)
        source = token - old[:, None] + skip[:, None]
        enters = ((token >= old[:, None]) & (token < new[:, None]))[..., None, None]
        for x, out in ((k, state.sink_k), (v, state.sink_v)):
            out.copy_(torch.where(enters, _rows_at(x, source.clamp(0, n - 1)), out))
    if last := min(n, capacity):  # slots of so many tokens in a row are all different
        source = i[n - last :]
        slot = (old[:, None] + source - skip[:, None]) % capacity
        enters = (source >= skip[:, None])[..., None, None]
        for x, out in ((k, state.ring_k), (v, state.ring_v)):
            found = torch.where(enters, x[:, n - last :], _rows_at(out, slot))
            out.scatter_(1, slot[..., None, None].expand_as(found), found)
    torch.maximum(state.exact_from, new - capacity, out=state.exact_from)
    state.quantized.copy_(until)
    state.lengths.copy_(new)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, t, heads, D], index int64 [batch, n] -> [batch, n, heads, D]."""
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


@torch.library.custom_op("bitpalette::kv_static_store", mutates_args=())
def store(x: Tensor, mean: Tensor | None, kernel: str) -> Tensor:
    """x [batch, kv_heads, n, D] -> R (x - mean) [batch, n, kv_heads, D], contiguous, of x's dtype."""
    x, found = x.transpose(1, 2), _kernel(kernel)
    if found is not None:
        return found.rotate(x, x.dtype, mean)
    return rotate(x.float() if mean is None else x.float() - mean).to(x.dtype).contiguous()


@store.register_fake
def _(x: Tensor, mean: Tensor | None, kernel: str) -> Tensor:
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)


@torch.library.custom_op("bitpalette::kv_static_attend", mutates_args=())
def attend(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Sequence[Tensor],
    numbers: Sequence[int],
    kernel: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`kv_reference.attention` over a state and n new tokens k, v [batch, n, kv_heads, D] as stored: [batch, n, heads,
    Dv] of the dtype of query [batch, heads, n, D]. mask: as `padding_on_host` has it. state: of `StaticState`; numbers:
    of `format_numbers`; kernel: name of a kernel or "reference"."""
    held, form, found, n = StaticState(*state), _format(numbers), _kernel(kernel), k.shape[1]
    if found is not None and _on_device(found, held, n):
        skip = padding_on_device(mask, held.lengths, n)
        out = attend_on_device(found, query, k, v, skip, held, form, scale, softcap, sliding_window, sink_logits)
    else:
        rows = StaticRows(held, form, found)
        padding = padding_on_host(mask, rows.lengths, n)
        out = attention(found, query, rows, (k, v), padding, scale, softcap, sliding_window, sink_logits)
    return out.to(query.dtype).transpose(1, 2).contiguous()


@attend.register_fake
def _(
    query: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], numbers: Any, *rest: Any
) -> Tensor:
    batch, heads, n, _ = query.shape
    return query.new_empty(batch, n, heads, v.shape[-1])


@torch.library.custom_op("bitpalette::kv_static_append", mutates_args={"state"})
def append(
    k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], numbers: Sequence[int], kernel: str
) -> None:
    """The tokens of `attend` into the state. KVError where there is no room for them."""
    held, form, found, n = StaticState(*state), _format(numbers), _kernel(kernel), k.shape[1]
    if found is not None and _on_device(found, held, n):
        append_on_device(found, k, v, padding_on_device(mask, held.lengths, n), held, form)
        return
    rows = StaticRows(held, form, found)
    rows.append(k, v, padding_on_host(mask, rows.lengths, n))
    rows.write_back()


@append.register_fake
def _(k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], numbers: Any, kernel: str) -> None:
    return None
