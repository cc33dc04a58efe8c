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

from ..quant.hartley import odd_part
from ..quant.kv_format import PAGE, KVError, KVFormat
from ..quant.kv_token import STEP, _hartley, packed_bytes
from ..quant.native import DTYPES
from .kv_cpu import BITS, MOST_TOKENS, Dense, Pages, _address, _check, _check_dense, _numbers, _rows_contiguous
from .kv_parts import parts_of
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
        if form.kind != "token":
            return f"the CUDA kernels have the kind 'token', not {form.kind!r}"
        for side, bits, width in (("keys", form.bits_k, head_dim), ("values", form.bits_v, head_dim_v)):
            if bits not in BITS:
                return f"the CUDA kernels have {side} of {list(BITS)} bits, not {bits}"
            if width < WIDTH_STEP or width % WIDTH_STEP or width > MOST_WIDTH:
                return f"the CUDA kernels have {side} with a head_dim in steps of 16 up to {MOST_WIDTH}, not {width}"
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
        out_dtype: torch.dtype = torch.float32,
        rotate: bool = False,
    ) -> Tensor:
        """softmax(scale q K^T) V: `out_dtype` [batch, heads, n, Dv] for q [batch, heads, n <= 16, D] of any dtype.

        As `kv_cpu.KVCpu.attend`; rotate: q comes as the model has it and the result leaves so, both are rotated on the
        device. Lengths that do not fit their slots or tables are not noticed. ValueError for sizes that cannot be.
        """
        batch, heads, n, head_dim = q.shape
        kv_heads = pages.k_codes.shape[1]
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads over {kv_heads} kv heads; a multiple is needed")
        head_dim_v = pages.v_codes.shape[-1] * 8 // pages.bits_v
        _check(pages, batch, head_dim, head_dim_v)
        q = q if q.dtype in DTYPES and q.is_contiguous() else q.float().contiguous()
        pieces = [None if part is None else _aligned(part) for part in (sinks, window, fresh)]
        dense = [part for part in pieces if part is not None]
        dtype = dense[0].keys.dtype if dense else torch.float32
        for part in dense:
            _check_dense(part, dtype, batch, kv_heads, head_dim, head_dim_v)
        rows, table_row = heads // kv_heads * n, pages.block_table.shape[1]
        splits, dense_splits = split_counts(
            q.device, batch * kv_heads, rows, max(head_dim, head_dim_v), table_row, sum(p.keys.shape[1] for p in dense)
        )
        parts = torch.empty(batch * kv_heads * splits * rows * (head_dim_v + 2), device=q.device)
        logits = None if sink_logits is None else sink_logits.float().contiguous()
        out = torch.empty(batch, heads, n, head_dim_v, dtype=out_dtype, device=q.device)
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
                sinks=_numbers(pieces[0]),
                window=_numbers(pieces[1]),
                fresh=_numbers(pieces[2]),
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
                q=q.data_ptr(),
                q_dtype=DTYPES[q.dtype],
                rotate=rotate,
                matrix_k=_address(_matrix(head_dim, q.device) if rotate else None),
                matrix_v=_address(_matrix(head_dim_v, q.device) if rotate else None),
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
        n, kv_heads, head_dim = x.shape
        expected = (codes.shape[0], kv_heads, PAGE, packed_bytes(head_dim, bits))
        if tuple(codes.shape) != expected or tuple(gain.shape) != expected[:3]:
            raise ValueError(f"codes {list(codes.shape)}, gain {list(gain.shape)} for x {list(x.shape)} of {bits} bits")
        if not (codes.is_contiguous() and gain.is_contiguous()):
            raise ValueError("codes or gain are not contiguous; a whole pool is needed")
        if slots.shape != (n,) or slots.dtype != torch.int64:
            raise ValueError(f"slots {slots.dtype} {list(slots.shape)} for {n} tokens; int64 [{n}] is needed")
        x, slots = _rows_contiguous(x), slots.contiguous()
        with _on(x.device):
            cuda_module().kv_append(
                **_tokens(x, mean),
                rotate=not rotated,
                matrix=_address(None if rotated else _matrix(head_dim, x.device)),
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
        flat = x.reshape(-1, *x.shape[-2:]) if mean is not None else x.reshape(-1, 1, x.shape[-1])
        flat, z = _rows_contiguous(flat), torch.empty(x.shape, dtype=dtype, device=x.device)
        with _on(x.device):
            cuda_module().kv_rotate(
                **_tokens(flat, mean),
                matrix=_address(_matrix(x.shape[-1], x.device)),
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


def _matrix(width: int, device: torch.device) -> Tensor | None:
    """The Hartley part of the rotation of `width` elements, float32 [p, p]; None where p = 1."""
    odd = odd_part(width)[0]
    if odd == 1:
        return None
    if (odd, device) not in _matrices:
        with torch.inference_mode(False):
            _matrices[odd, device] = _hartley(odd).float().contiguous().to(device)
    return _matrices[odd, device]


_counts: dict[torch.device, int] = {}
_matrices: dict[tuple[int, torch.device], Tensor] = {}


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _aligned(dense: Dense) -> Dense:
    """Vectors that begin at multiples of 16 bytes: what they are but in views of odd strides, which are copied."""

    def one(t: Tensor) -> Tensor:
        unit = 16 // t.element_size()
        odd = t.data_ptr() % 16 or any(stride % unit for stride in t.stride()[:3])
        return t.contiguous() if odd or t.stride(-1) != 1 else t

    return Dense(one(dense.keys), one(dense.values), dense.lengths, dense.first)


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
