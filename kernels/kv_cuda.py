"""The packed KV cache on a CUDA device, in native code (csrc/cuda/kv_*.cuh): attention over pages, append, rotations.

Nothing waits for the device, and all that is allocated comes from torch's caching allocator: calls can be captured in a
CUDA graph. Lengths, tables and slots are read on the device. How a call is split among blocks follows from capacities
(slots, pages of a table's row), so results are the same from run to run, and may differ by rounding between devices
with another number of multiprocessors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.kv_format import KVError, KVFormat
from ..quant.kv_token import STEP
from ..quant.native import DTYPES
from .kv_parts import (
    MOST_TOKENS,
    Dense,
    Pages,
    address,
    by_heads,
    check_append,
    dense_numbers,
    odd_matrix,
    parts_of,
    rows_contiguous,
    sizes_of,
    token_numbers,
    why_not_form,
)
from .kv_rows import KVRows
from .native_cuda import cuda_module, current_stream, shared_limit, why_no_cuda_module, why_not_device

MOST_WIDTH = 256
WIDTH_STEP = 16
QUERIES = 16
"""Of a block at most; 8 where head_dim is above 128."""

BLOCKS = 3
"""Of a multiprocessor at once: their registers and rings fit."""

PAGES_OF_SPLIT = 2
"""At least: one step of 32 tokens for each of four warps."""

DENSE_OF_SPLIT = 128
MOST_DENSE_SPLITS, MOST_SPLITS = 8, 256


class KVCuda:
    """Attention and append by the CUDA kernels; the signatures of `kv_cpu.KVCpu`."""

    name = "cuda"
    device_type = "cuda"
    most_tokens = MOST_TOKENS

    def why_not(self, form: KVFormat, head_dim: int, head_dim_v: int, device: torch.device | None = None) -> str | None:
        """None where caches of this form (on this device, where one is given) are for these kernels, else the reason
        in words."""
        reason = why_no_cuda_module() if device is None else why_not_device(device)
        if reason is not None:
            return reason
        return why_not_form("the CUDA kernels have", form, (head_dim, head_dim_v), WIDTH_STEP, MOST_WIDTH)

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
        out_dtype: torch.dtype = torch.float32,
        rotate: bool = False,
    ) -> Tensor:
        """softmax(scale q K^T) V: `out_dtype` [batch, heads, n, Dv] for q [batch, heads, n <= 16, D] of any dtype.

        As `kv_cpu.KVCpu.attend`; rotate: q comes as the model has it and the result leaves so, both are rotated on the
        device. Lengths that do not fit their slots or tables are not noticed. ValueError for sizes that cannot be.
        """
        pieces = [None if part is None else _aligned(part) for part in (sinks, window, fresh)]
        dense = [part for part in pieces if part is not None]
        sizes = sizes_of(q, pages, dense)
        q = q if q.dtype in DTYPES and q.is_contiguous() else q.float().contiguous()
        heads, rows, table_row = sizes.batch * sizes.kv_heads, sizes.group * sizes.tokens, pages.block_table.shape[1]
        width = max(sizes.head_dim, sizes.head_dim_v)
        splits, dense_splits = split_counts(
            q.device, heads, rows, width, table_row, sum(p.keys.shape[1] for p in dense)
        )
        parts = torch.empty(heads * splits * rows * (sizes.head_dim_v + 2), device=q.device)
        logits = None if sink_logits is None else sink_logits.float().contiguous()
        out = torch.empty(sizes.out, dtype=out_dtype, device=q.device)
        with _on(q.device):
            cuda_module().kv_attention(
                k_codes=pages.k_codes.data_ptr(),
                v_codes=pages.v_codes.data_ptr(),
                k_gain=pages.k_gain.data_ptr(),
                v_gain=pages.v_gain.data_ptr(),
                bits_k=pages.bits_k,
                bits_v=pages.bits_v,
                block_table=pages.block_table.data_ptr(),
                table_row=table_row,
                lengths=pages.lengths.data_ptr(),
                sinks=dense_numbers(pieces[0]),
                window=dense_numbers(pieces[1]),
                fresh=dense_numbers(pieces[2]),
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
                q=q.data_ptr(),
                q_dtype=DTYPES[q.dtype],
                rotate=rotate,
                matrix_k=address(odd_matrix(sizes.head_dim, q.device) if rotate else None),
                matrix_v=address(odd_matrix(sizes.head_dim_v, q.device) if rotate else None),
                out=out.data_ptr(),
                out_dtype=DTYPES[out_dtype],
                splits=splits,
                dense_splits=dense_splits,
                parts=parts.data_ptr(),
                shared_limit=shared_limit(q.device),
                stream=current_stream(q.device),
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
    ) -> Tensor:
        """What `kv_reference.attention` computes, for up to 16 new tokens: float32 [batch, heads, n, Dv]."""
        form, n = rows.form, query.shape[2]
        if (reason := self.why_not(form, rows.head_dim, rows.head_dim_v)) is not None:
            raise KVError(f"{reason}; use kernels/kv_reference.py")
        if n > MOST_TOKENS:
            raise KVError(f"{n} new tokens; the CUDA kernels take {MOST_TOKENS} at a time: use kernels/kv_reference.py")
        pages, sinks, window, fresh = parts_of(rows, new, skip, n)
        return self.attend(
            query,
            pages,
            sinks,
            window,
            fresh,
            scale=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            sink_logits=sink_logits,
            rotate=True,
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
        """x [n, kv_heads, D] encoded into slots int64 [n], as `kv_cpu.KVCpu.append` does, to the bit.

        But a slot outside of the pages (such as -1) is passed over, not refused: the device alone knows the slots.
        """
        check_append(x, slots, codes, gain, bits)
        x, slots = rows_contiguous(x), slots.contiguous()
        with _on(x.device):
            cuda_module().kv_append(
                **token_numbers(x, mean),
                rotate=not rotated,
                matrix=address(None if rotated else odd_matrix(x.shape[-1], x.device)),
                codes=codes.data_ptr(),
                gain=gain.data_ptr(),
                pages=codes.shape[0],
                bits=bits,
                unbiased=unbiased,
                step=STEP[bits],
                slots=slots.data_ptr(),
                stream=current_stream(x.device),
            )

    def rotate(self, x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
        """R (x - mean) over the last dimension of x [..., heads, D]: what `kv_token.rotate` gives, contiguous.

        mean: float32 [heads, D], or None. dtype: of the result; None: that of x.
        """
        dtype = x.dtype if dtype is None else dtype
        flat, z = by_heads(x, mean), torch.empty(x.shape, dtype=dtype, device=x.device)
        with _on(x.device):
            cuda_module().kv_rotate(
                **token_numbers(flat, mean),
                matrix=address(odd_matrix(x.shape[-1], x.device)),
                z=z.data_ptr(),
                z_dtype=DTYPES[dtype],
                stream=current_stream(x.device),
            )
        return z


def split_counts(
    device: torch.device, heads: int, rows: int, width: int, table_row: int, dense_slots: int
) -> tuple[int, int]:
    """(all splits, those for tokens in 16 bits) of a row and kv head. heads: rows of the batch times kv heads; rows: of
    queries; all of them capacities, so that a captured call is right for any lengths."""
    dense = min(-(-dense_slots // DENSE_OF_SPLIT), MOST_DENSE_SPLITS)
    if table_row == 0:
        return max(dense, 1), dense
    of_block = QUERIES if rows > QUERIES // 2 and width <= 128 else QUERIES // 2
    # one wave: a block more than fit at once would take as long as all others
    wanted = BLOCKS * _multiprocessors(device) // (heads * -(-rows // of_block)) - dense
    return dense + max(1, min(wanted, -(-table_row // PAGES_OF_SPLIT), MOST_SPLITS - dense)), dense


def _multiprocessors(device: torch.device) -> int:
    if device not in _counts:
        _counts[device] = (
            int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2
        )
    return _counts[device]


_counts: dict[torch.device, int] = {}


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _aligned(dense: Dense) -> Dense:
    """Vectors that begin at multiples of 16 bytes: what they are but in views of odd strides, which are copied."""

    def one(t: Tensor) -> Tensor:
        unit = 16 // t.element_size()
        odd = t.data_ptr() % 16 or any(stride % unit for stride in t.stride()[:3])
        return t.contiguous() if odd or t.stride(-1) != 1 else t

    return Dense(one(dense.keys), one(dense.values), dense.lengths, dense.first)
