"""The packed KV cache on a CPU, in native code: attention over pages, appending to them, rotations (csrc/cpu/kv_*.h).

Queries are rounded to 8 bits with one scale each, or to 16 (`exact`); the products with codes are whole numbers, the
weights of a page's values have 15 bits of its largest. Results depend neither on the number of threads nor on how the
work is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import PAGE, KVError, KVFormat
from ..quant.kv_token import packed_bytes
from ..quant.native import DTYPES, cpu_module, why_no_cpu_module
from .isa import OnInstructionSet
from .kv_rows import KVRows

BITS = (2, 3, 4, 8)
MOST_TOKENS = 16
"""New tokens of one call; above it, decoding pages for a matrix product is faster than reading them in place."""

MOST_ODD = 1024
"""Largest odd part of a head_dim that is rotated natively."""


@dataclass(frozen=True)
class Pages:
    """Codes uint8 [pages, kv_heads, 64, D bits / 8] and gains fp16 [pages, kv_heads, 64] of keys and values, and which
    of them a row of the batch has: block_table int32 [batch, most pages], lengths int32 [batch] in tokens."""

    k_codes: Tensor
    k_gain: Tensor
    v_codes: Tensor
    v_gain: Tensor
    bits_k: int
    bits_v: int
    block_table: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Dense:
    """Tokens in 16 or 32 bits, rotated and with centered keys: keys [batch, slots, kv_heads, D], values likewise with
    any strides but the last; lengths int32 [batch]. first int32 [batch]: slot of the first token, slot 0 comes after
    the last; None: 0."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    first: Tensor | None = None


class KVCpu(OnInstructionSet):
    """Attention and append by one instruction set; without a name, the fastest or that of BITPALETTE_CPU_ISA."""

    name = "cpu"
    device_type = "cpu"
    most_tokens = MOST_TOKENS

    def why_not(self, form: KVFormat, head_dim: int, head_dim_v: int) -> str | None:
        """None where caches of this form are for native code, else the reason in words."""
        if (reason := why_no_cpu_module()) is not None:
            return reason
        if form.kind != "token":
            return f"native code has the kind 'token', not {form.kind!r}"
        for side, bits, width in (("keys", form.bits_k, head_dim), ("values", form.bits_v, head_dim_v)):
            if bits not in BITS:
                return f"native code has {side} of {list(BITS)} bits, not {bits}"
            if width < 8 or width % 8 or width // (width & -width) > MOST_ODD:
                return (
                    f"native code has {side} with a head_dim in steps of 8, of odd part up to {MOST_ODD}, not {width}"
                )
        return None

    def attend(
        self,
        q: Tensor,
        pages: Pages,
        sinks: Dense | None = None,
        window: Dense | None = None,
        fresh: Dense | None = None,
        *,
        scale: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        start: Tensor | None = None,
        sink_logits: Tensor | None = None,
        exact: bool | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """softmax(scale q K^T) V, still rotated: `out_dtype` [batch, heads, n, Dv] for q [batch, heads, n <= 16, D].

        A row's positions are its sinks, pages, window and fresh tokens, one after another; the queries are those of the
        last n. A query sees its own position and those before it, from start[b] (int32 [batch]) on, at most
        `sliding_window` of them; one that sees nothing is zero. softcap: scores become softcap tanh(score / softcap).
        sink_logits [heads]: a term more of each denominator. exact: queries in 16 bits instead of 8;
        None: where keys have 8, whose own error is no larger than that of 8-bit queries (0.9 % and 0.6 %; 11 % at 4).
        ValueError for sizes that cannot be.
        """
        batch, heads, n, head_dim = q.shape
        kv_heads = pages.k_codes.shape[1]
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads over {kv_heads} kv heads; a multiple is needed")
        head_dim_v = pages.v_codes.shape[-1] * 8 // pages.bits_v
        _check(pages, batch, head_dim, head_dim_v)
        q = q if q.dtype in DTYPES and q.is_contiguous() else q.float().contiguous()
        dense = [part for part in (sinks, window, fresh) if part is not None]
        dtype = dense[0].keys.dtype if dense else torch.float32
        for part in dense:
            _check_dense(part, dtype, batch, kv_heads, head_dim, head_dim_v)
        logits = None if sink_logits is None else sink_logits.float().contiguous()
        out = torch.empty(batch, heads, n, head_dim_v, dtype=out_dtype)
        cpu_module().kv_attention(
            self.resolve_isa(),
            k_codes=pages.k_codes.data_ptr(),
            v_codes=pages.v_codes.data_ptr(),
            k_gain=pages.k_gain.data_ptr(),
            v_gain=pages.v_gain.data_ptr(),
            bits_k=pages.bits_k,
            bits_v=pages.bits_v,
            block_table=pages.block_table.data_ptr(),
            table_row=pages.block_table.shape[1],
            lengths=pages.lengths.data_ptr(),
            sinks=_numbers(sinks),
            window=_numbers(window),
            fresh=_numbers(fresh),
            dense_dtype=DTYPES[dtype],
            start=_address(start),
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            tokens=n,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            scale=scale,
            softcap=softcap or 0.0,
            sliding_window=sliding_window or 0,
            sink_logits=_address(logits),
            exact=pages.bits_k == 8 if exact is None else exact,
            q=q.data_ptr(),
            q_dtype=DTYPES[q.dtype],
            out=out.data_ptr(),
            out_dtype=DTYPES[out_dtype],
            threads=torch.get_num_threads(),
        )
        return out

    def attention(
        self,
        query: Tensor,
        rows: KVRows,
        new: tuple[Tensor, Tensor] | None,
        skip: NDArray[np.int64],
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sink_logits: Tensor | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """What `kv_reference.attention` computes, for up to 16 new tokens, in the dtype of the query."""
        form, n = rows.form, query.shape[2]
        if (reason := self.why_not(form, rows.head_dim, rows.head_dim_v)) is not None:
            raise KVError(f"{reason}; use kernels/kv_reference.py")
        if query.dtype not in DTYPES:
            query = query.float()
        if query.stride(3) != 1:
            query = query.contiguous()
        batch, heads = query.shape[:2]
        if batch != rows.batch or heads % rows.kv_heads or query.shape[3] != rows.head_dim:
            raise ValueError(f"queries {list(query.shape)} over {rows.batch} rows of {[rows.kv_heads, rows.head_dim]}")
        fresh = ((), ()) if new is None else (_side(new[0], rows), _side(new[1], rows))
        padding = np.ascontiguousarray(skip) if skip.any() else None
        logits = None if sink_logits is None else sink_logits.float().contiguous()
        out = torch.empty(batch, n, heads, rows.head_dim_v, dtype=query.dtype)
        strides = query.stride()
        cpu_module().kv_attend_rows(
            self.resolve_isa(),
            _rows(rows),
            (query.data_ptr(), DTYPES[query.dtype], strides[0], strides[1], strides[2], heads // rows.kv_heads, n),
            *fresh,
            0 if padding is None else padding.ctypes.data,
            scaling,
            softcap or 0.0,
            sliding_window or 0,
            _address(logits),
            form.bits_k == 8 if exact is None else exact,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.transpose(1, 2)

    def store(self, rows: KVRows, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`KVRows.stored` in one call."""
        batch, kv_heads, n, _ = key.shape
        k, v = key.to(rows.dtype), value.to(rows.dtype)
        if k.stride(3) != 1 or v.stride(3) != 1:
            k, v = k.contiguous(), v.contiguous()
        if k.shape[:2] != (rows.batch, rows.kv_heads):
            raise ValueError(f"keys {list(k.shape)} for {rows.batch} rows of {rows.kv_heads} heads")
        stored_k = k.new_empty(batch, n, kv_heads, rows.head_dim)
        stored_v = k.new_empty(batch, n, kv_heads, rows.head_dim_v)
        cpu_module().kv_store(
            self.resolve_isa(),
            _rows(rows),
            (k.data_ptr(), k.stride(0), k.stride(2), k.stride(1)),
            (v.data_ptr(), v.stride(0), v.stride(2), v.stride(1)),
            n,
            stored_k.data_ptr(),
            stored_v.data_ptr(),
            torch.get_num_threads(),
        )
        return stored_k, stored_v

    def append_rows(self, rows: KVRows, k: Tensor, v: Tensor, skip: NDArray[np.int64] | None) -> bool:
        """`KVRows.append` in one call; False where pages are missing."""
        if not (k.is_contiguous() and v.is_contiguous()):
            k, v = k.contiguous(), v.contiguous()
        padding = None if skip is None else np.ascontiguousarray(skip)
        return bool(
            cpu_module().kv_append_rows(
                self.resolve_isa(),
                _rows(rows),
                _side(k, rows),
                _side(v, rows),
                k.shape[1],
                0 if padding is None else padding.ctypes.data,
                torch.get_num_threads(),
            )
        )

    def append(
        self,
        x: Tensor,
        slots: Tensor,
        codes: Tensor,
        gain: Tensor,
        bits: int,
        unbiased: bool,
        mean: Tensor | None = None,
        rotated: bool = True,
    ) -> None:
        """x [n, kv_heads, D] encoded into slots int64 [n] (page * 64 + token of the page) of codes uint8 [pages,
        kv_heads, 64, D bits / 8] and gain fp16 [pages, kv_heads, 64], as `kv_token.encode` and `pack` do.

        unbiased: keys. rotated: x is centered and rotated already; else R (x - mean), mean float32 [kv_heads, D], is
        encoded. ValueError for a slot outside of the pages.
        """
        n, kv_heads, head_dim = x.shape
        expected = (codes.shape[0], kv_heads, PAGE, packed_bytes(head_dim, bits))
        if tuple(codes.shape) != expected or tuple(gain.shape) != expected[:3]:
            raise ValueError(f"codes {list(codes.shape)}, gain {list(gain.shape)} for x {list(x.shape)} of {bits} bits")
        if slots.shape != (n,) or slots.dtype != torch.int64:
            raise ValueError(f"slots {slots.dtype} {list(slots.shape)} for {n} tokens; int64 [{n}] is needed")
        x, slots = _rows_contiguous(x), slots.contiguous()
        cpu_module().kv_append(
            self.resolve_isa(),
            **_tokens(x, mean),
            rotate=not rotated,
            codes=codes.data_ptr(),
            gain=gain.data_ptr(),
            pages=codes.shape[0],
            bits=bits,
            unbiased=unbiased,
            slots=slots.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def rotate(self, x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
        """R (x - mean) over the last dimension of x [..., heads, D]: what `kv_token.rotate` gives, contiguous.

        mean: float32 [heads, D], or None. dtype: of the result; None: that of x.
        """
        dtype = x.dtype if dtype is None else dtype
        flat = x.reshape(-1, *x.shape[-2:]) if mean is not None else x.reshape(-1, 1, x.shape[-1])
        flat, z = _rows_contiguous(flat), torch.empty(x.shape, dtype=dtype)
        cpu_module().kv_rotate(
            self.resolve_isa(),
            **_tokens(flat, mean),
            z=z.data_ptr(),
            z_dtype=DTYPES[dtype],
            threads=torch.get_num_threads(),
        )
        return z


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(rows: KVRows) -> tuple[object, ...]:
    """What csrc/bind/cpu_kv_rows.cpp reads of them; kept there until something is replaced."""
    if rows.native is not None:
        return rows.native
    rows.lengths, rows.quantized, rows.exact_from, rows.claimed = (
        np.ascontiguousarray(x, np.int64) for x in (rows.lengths, rows.quantized, rows.exact_from, rows.claimed)
    )
    sides = []
    for side, sinks, ring in (
        (rows.pool.keys, rows.sink_k, rows.ring_k),
        (rows.pool.values, rows.sink_v, rows.ring_v),
    ):
        assert side.gain is not None
        parts = (sinks.data_ptr(), ring.data_ptr(), side.codes.data_ptr(), side.gain.data_ptr())
        sides.append((*parts, side.bits, side.head_dim))
    table = rows.block_table
    rows.native = (
        rows.batch,
        rows.kv_heads,
        rows.form.sinks,
        rows.form.window,
        rows.capacity,
        rows.pool.pages,
        DTYPES[rows.dtype],
        table.data_ptr(),
        table.shape[1],
        rows.lengths.ctypes.data,
        rows.quantized.ctypes.data,
        rows.exact_from.ctypes.data,
        rows.claimed.ctypes.data,
        _address(rows.mean),
        *sides,
    )
    return rows.native


def _side(x: Tensor, rows: KVRows) -> tuple[int, ...]:
    """Stored tokens [batch, n, kv_heads, D]."""
    if x.dtype != rows.dtype or x.stride(3) != 1:
        raise ValueError(f"stored tokens {x.dtype} with strides {x.stride()}; {rows.dtype}, the last stride 1")
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _rows_contiguous(x: Tensor) -> Tensor:
    """x, copied where its last dimension has a stride or its dtype is none of native code's."""
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens(x: Tensor, mean: Tensor | None) -> dict[str, Any]:
    """What native code is told of x [tokens, heads, D] and mean [heads, D]. `x` must outlive the call."""
    if mean is not None and (mean.shape != x.shape[1:] or mean.dtype != torch.float32 or not mean.is_contiguous()):
        raise ValueError(f"a mean {mean.dtype} {list(mean.shape)} for tokens {list(x.shape)}; float32 [heads, D]")
    return {
        "x": x.data_ptr(),
        "dtype": DTYPES[x.dtype],
        "token_stride": x.stride(0),
        "head_stride": x.stride(1),
        "tokens": x.shape[0],
        "heads": x.shape[1],
        "width": x.shape[2],
        "mean": _address(mean),
    }


def _numbers(dense: Dense | None) -> tuple[int, ...]:
    if dense is None:
        return ()
    k, v = dense.keys, dense.values
    addresses = (_address(dense.lengths), _address(dense.first))
    return (k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3], *addresses, k.shape[1])


def _check(pages: Pages, batch: int, head_dim: int, head_dim_v: int) -> None:
    """ValueError where native code would read outside of a tensor."""
    count, kv_heads = pages.k_codes.shape[:2]
    wanted = {
        "k_codes": ((count, kv_heads, PAGE, packed_bytes(head_dim, pages.bits_k)), torch.uint8),
        "v_codes": ((count, kv_heads, PAGE, packed_bytes(head_dim_v, pages.bits_v)), torch.uint8),
        "k_gain": ((count, kv_heads, PAGE), torch.float16),
        "v_gain": ((count, kv_heads, PAGE), torch.float16),
        "block_table": ((batch, pages.block_table.shape[-1]), torch.int32),
        "lengths": ((batch,), torch.int32),
    }
    for name, (shape, dtype) in wanted.items():
        t = getattr(pages, name)
        if tuple(t.shape) != shape or t.dtype != dtype or not t.is_contiguous():
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}; contiguous {dtype} {list(shape)} is needed")


def _check_dense(dense: Dense, dtype: torch.dtype, batch: int, kv_heads: int, head_dim: int, head_dim_v: int) -> None:
    slots = dense.keys.shape[1]
    for name, t, width in (("keys", dense.keys, head_dim), ("values", dense.values, head_dim_v)):
        if tuple(t.shape) != (batch, slots, kv_heads, width) or t.dtype != dtype or t.stride(-1) != 1:
            wanted = [batch, slots, kv_heads, width]
            raise ValueError(f"{name} are {t.dtype} {list(t.shape)}, last stride {t.stride(-1)}; {dtype} {wanted}, 1")
    if dtype not in DTYPES:
        raise ValueError(f"dense tokens are {dtype}; one of {list(DTYPES)} is needed")
    for name, index in (("lengths", dense.lengths), ("first", dense.first)):
        if index is not None and (index.shape != (batch,) or index.dtype != torch.int32 or not index.is_contiguous()):
            raise ValueError(f"{name} is {index.dtype} {list(index.shape)}; contiguous int32 [{batch}] is needed")
