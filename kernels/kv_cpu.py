"""The packed KV cache on a CPU, in native code: attention over pages, appending to them, rotations (csrc/cpu/kv_*.h).

Queries are rounded to 8 bits with one scale each, or to 16 (`exact`); the products with codes are whole numbers, the
weights of a page's values have 15 bits of its largest. Results depend neither on the number of threads nor on how the
work is split.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.hartley import odd_part
from ..quant.kv_format import KVError, KVFormat
from ..quant.native import DTYPES, cpu_module, why_no_cpu_module
from .isa import OnInstructionSet
from .kv_parts import (
    MOST_TOKENS,
    Dense,
    Pages,
    address,
    by_heads,
    check_append,
    dense_numbers,
    rows_contiguous,
    sizes_of,
    token_numbers,
    why_not_form,
)
from .kv_rows import KVRows

MOST_ODD = 1024
"""Largest odd part of a head_dim that is rotated natively."""


class KVCpu(OnInstructionSet):
    """Attention and append by one instruction set; without a name, the fastest or that of BITPALETTE_CPU_ISA."""

    name = "cpu"
    device_type = "cpu"
    most_tokens = MOST_TOKENS

    def why_not(self, form: KVFormat, head_dim: int, head_dim_v: int) -> str | None:
        """None where caches of this form are for native code, else the reason in words."""
        if (reason := why_no_cpu_module()) is not None:
            return reason
        if (reason := why_not_form("native code has", form, (head_dim, head_dim_v), 8, None)) is not None:
            return reason
        for side, width in (("keys", head_dim), ("values", head_dim_v)):
            if odd_part(width)[0] > MOST_ODD:
                return f"native code has {side} with a head_dim of odd part up to {MOST_ODD}, not {width}"
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
        dense = [part for part in (sinks, window, fresh) if part is not None]
        sizes = sizes_of(q, pages, dense)
        q = q if q.dtype in DTYPES and q.is_contiguous() else q.float().contiguous()
        logits = None if sink_logits is None else sink_logits.float().contiguous()
        out = torch.empty(sizes.out, dtype=out_dtype)
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
            sinks=dense_numbers(sinks),
            window=dense_numbers(window),
            fresh=dense_numbers(fresh),
            dense_dtype=DTYPES[sizes.dtype or torch.float32],
            start=address(start),
            batch=sizes.batch,
            kv_heads=sizes.kv_heads,
            group=sizes.group,
            tokens=sizes.tokens,
            head_dim=sizes.head_dim,
            head_dim_v=sizes.head_dim_v,
            scale=scale,
            softcap=softcap or 0.0,
            sliding_window=sliding_window or 0,
            sink_logits=address(logits),
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
            address(logits),
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
        check_append(x, slots, codes, gain, bits)
        x, slots = rows_contiguous(x), slots.contiguous()
        cpu_module().kv_append(
            self.resolve_isa(),
            **token_numbers(x, mean),
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
        flat, z = by_heads(x, mean), torch.empty(x.shape, dtype=dtype)
        cpu_module().kv_rotate(
            self.resolve_isa(),
            **token_numbers(flat, mean),
            z=z.data_ptr(),
            z_dtype=DTYPES[dtype],
            threads=torch.get_num_threads(),
        )
        return z


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
        address(rows.mean),
        *sides,
    )
    return rows.native


def _side(x: Tensor, rows: KVRows) -> tuple[int, ...]:
    """Stored tokens [batch, n, kv_heads, D]."""
    if x.dtype != rows.dtype or x.stride(3) != 1:
        raise ValueError(f"stored tokens {x.dtype} with strides {x.stride()}; {rows.dtype}, the last stride 1")
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
