"""The packed KV cache by Triton: launchers of triton_device/kv_*.py.

Over pages queries are float16, divided by their largest; codes are exact, weights float16, sums float32. The same
launch gives the same bits from run to run. Nothing here waits for the device, and nothing is allocated but by torch:
calls can be captured in a CUDA graph once they have been made before it, which compiles them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.hartley import odd_part
from ..quant.kv_format import PAGE, KVError, KVFormat
from ..quant.kv_token import GAIN_MOST, STEP
from .kv_parts import (
    MOST_TOKENS,
    Dense,
    Pages,
    by_heads,
    check_append,
    check_mean,
    odd_matrix,
    parts_of,
    rows_contiguous,
    sizes_of,
    why_not_form,
)
from .kv_rows import KVRows
from .triton_runtime import interpreting, on_device, why_no_triton, why_not_device

MOST_HEAD_DIM = 256
"""A program holds the output of 16 rows and a tile of 16-bit keys in registers; with more it would spill."""

KEY_WORD = {2: torch.int16, 3: torch.int16, 4: torch.int32, 8: torch.int32}
VALUE_WORD = {2: torch.uint8, 3: torch.uint8, 4: torch.int16, 8: torch.int16}
"""What rows of codes are read as (triton_device/kv_codes.py)."""

WRITTEN_WORD = {2: torch.uint8, 3: torch.uint8, 4: torch.int16, 8: torch.int32}
"""What they are written as: four codes, of 3 bits the low two of four."""

NO_SLIDING = 1 << 30
MOST_SPLITS = 128
LEAST_PAGES = 4
"""Of a split: 256 tokens, some 16 KB of 4-bit keys and values of 64 channels, are worth a program."""


BLOCK_M = 16
"""Query rows a program: one row of matrix instructions. With more of them Triton gives the rows to different warps, and
each decodes all codes; further rows of a kv head are a program of their own, which reads the codes from the L2."""


@dataclass(frozen=True)
class KVLaunch:
    """block_t: tokens of a step over 16-bit parts; splits: programs that share a row's pages, one more has the rest."""

    block_t: int
    splits: int
    warps: int
    stages: int


def launch_for(
    batch: int,
    kv_heads: int,
    rows: int,
    pages: int,
    head_dim: int,
    processors: int,
    itemsize: int = 2,
    bits: int = 4,
) -> KVLaunch:
    """How attention is launched. rows: query heads of a kv head times new tokens; pages: that a row has room for, not
    those that it has; processors: the GPU's multiprocessors; itemsize: of 16-bit parts, 4 in float32; bits: of keys or
    of values, whichever have more."""
    # 64 channels are four planes of 16, all that one warp multiplies: a second does the same again. Twice as many are
    # there only where float32 parts would spill (of 256 channels 152 bytes; with eight warps 8 are left), or 64
    # channels of 8 bits (72 bytes on sm_80)
    warps = 4 if head_dim > 64 else 1
    warps *= 2 if (itemsize == 4 and (head_dim <= 64 or head_dim > 128)) or (bits == 8 and head_dim <= 64) else 1
    programs = batch * kv_heads * -(-rows // BLOCK_M)
    resident = processors * (4 if head_dim > 64 else 8)
    splits = min(-(-resident // programs), -(-pages // LEAST_PAGES), MOST_SPLITS)
    return KVLaunch(32 if head_dim <= 128 and itemsize == 2 else 16, max(1, splits), warps, stages=3)


class KVTriton:
    """Attention and append on a GPU, or on a CPU under TRITON_INTERPRET=1."""

    name = "triton"
    most_tokens = MOST_TOKENS

    @property
    def device_type(self) -> str:
        return "cpu" if interpreting() else "cuda"

    def why_not(self, form: KVFormat, head_dim: int, head_dim_v: int) -> str | None:
        """None where caches of this form are for Triton here, else the reason in words."""
        if not interpreting() and not torch.cuda.is_available():
            return "Triton kernels run on a GPU, and torch sees none"
        if (reason := why_no_triton()) is not None:
            return reason
        return why_not_form("Triton kernels have", form, (head_dim, head_dim_v), 8, MOST_HEAD_DIM)

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
        launch: KVLaunch | None = None,
    ) -> Tensor:
        """softmax(scale q K^T) V, still rotated: `out_dtype` [batch, heads, n, Dv] for q [batch, heads, n <= 16, D].

        As `kv_cpu.KVCpu.attend`; lengths, block table and first slots are read on the device, and are not checked: a
        row's tokens beyond its part's slots or its table's pages are not read. launch: None for `launch_for`'s. A part
        may be of another dtype than its queries: 16-bit keys meet queries of 11 bits (float16) or 16 (bfloat16).
        ValueError for sizes that cannot be.
        """
        from .triton_device.kv_attention import attention_kernel
        from .triton_device.kv_combine import combine_kernel

        if (reason := why_not_device(q.device)) is not None:
            raise ValueError(f"queries are on {q.device}, where Triton kernels do not run: {reason}")
        sizes = sizes_of(q, pages, [part for part in (sinks, window, fresh) if part is not None])
        batch, n, kv_heads, head_dim_v = sizes.batch, sizes.tokens, sizes.kv_heads, sizes.head_dim_v
        rows = sizes.group * n
        q = q.contiguous()
        if launch is None:
            widest, itemsize = max(sizes.head_dim, head_dim_v), (sizes.dtype or torch.float16).itemsize
            places, bits = pages.block_table.shape[1], max(pages.bits_k, pages.bits_v)
            launch = launch_for(batch, kv_heads, rows, places, widest, _processors(q.device), itemsize, bits)
        splits = launch.splits + 1
        parts = torch.empty(batch, kv_heads, splits, rows, head_dim_v, dtype=torch.float32, device=q.device)
        most, sum = torch.empty(2, batch, kv_heads, splits, rows, dtype=torch.float32, device=q.device)
        out = torch.empty(sizes.out, dtype=out_dtype, device=q.device)
        with on_device(q.device):
            attention_kernel[splits, kv_heads * -(-rows // BLOCK_M), batch](
                q,
                *_key_words(pages.k_codes, pages.bits_k),
                pages.k_gain,
                pages.v_codes.view(VALUE_WORD[pages.bits_v]),
                pages.v_gain,
                pages.block_table,
                pages.lengths,
                *_pointers(sinks),
                *_pointers(window),
                *_pointers(fresh),
                start,
                parts,
                most,
                sum,
                kv_heads,
                rows,
                n,
                pages.block_table.shape[1],
                *_sizes(sinks),
                *_sizes(window),
                *_sizes(fresh),
                float(scale),
                float(softcap or 0.0),
                min(sliding_window or NO_SLIDING, NO_SLIDING),
                D=sizes.head_dim,
                DV=head_dim_v,
                BITS_K=pages.bits_k,
                BITS_V=pages.bits_v,
                HAS_SOFTCAP=softcap is not None,
                BLOCK_M=BLOCK_M,
                WIDTH_K=padded_width(sizes.head_dim),
                WIDTH_V=padded_width(head_dim_v),
                BLOCK_T=launch.block_t,
                STAGES=launch.stages,
                enable_fp_fusion=True,
                num_warps=launch.warps,
            )
            combine_kernel[rows, batch * kv_heads](
                parts,
                most,
                sum,
                sink_logits,
                out,
                kv_heads,
                rows,
                n,
                splits,
                DV=head_dim_v,
                BLOCK=power_of_two(head_dim_v),
                enable_fp_fusion=True,
                num_warps=1,
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
        if (reason := self.why_not(rows.form, rows.head_dim, rows.head_dim_v)) is not None:
            raise KVError(f"{reason}; use kernels/kv_reference.py")
        pages, sinks, window, fresh = parts_of(rows, new, skip, query.shape[2])
        out = self.attend(
            self.rotate(query, torch.float32),
            pages,
            sinks,
            window,
            fresh,
            scale=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            sink_logits=sink_logits,
        )
        return self.rotate(out, torch.float32)

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
        encoded. A token whose slot is not one of the pages', such as -1, is left out: slots are read on the device.
        """
        from .triton_device.kv_encode import append_kernel

        check_append(x, slots, codes, gain, bits)
        n, kv_heads, head_dim = x.shape
        if n:
            x, slots = rows_contiguous(x), slots.contiguous()
            vectors, block = n * kv_heads, _vectors(head_dim)
            with on_device(x.device):
                append_kernel[(-(-vectors // block),)](
                    **_rotation(x, mean, not rotated),
                    slots=slots,
                    codes=codes.view(WRITTEN_WORD[bits]),
                    gain=gain,
                    SLOTS=codes.shape[0] * PAGE,
                    step=STEP[bits],
                    most_gain=GAIN_MOST,
                    BITS=bits,
                    UNBIASED=unbiased,
                    ROTATE=not rotated,
                    BLOCK=block,
                    enable_fp_fusion=False,
                    num_warps=WARPS,
                )

    def rotate(self, x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
        """R (x - mean) over the last dimension of x [..., heads, D], the bits of `kv_token.rotate`, contiguous.

        mean: float32 [heads, D], or None. dtype: of the result; None: that of x.
        """
        from .triton_device.kv_encode import rotate_kernel

        if x.shape[-1] > MOST_HEAD_DIM:
            raise ValueError(f"a rotation of {x.shape[-1]} channels; Triton kernels have up to {MOST_HEAD_DIM}")
        y = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
        if y.numel():
            flat = by_heads(x, mean)
            block = _vectors(x.shape[-1])
            with on_device(x.device):
                rotate_kernel[(-(-flat.shape[0] * flat.shape[1] // block),)](
                    **_rotation(flat, mean, True), y=y, BLOCK=block, enable_fp_fusion=False, num_warps=WARPS
                )
        return y


WARPS = 4


def padded_width(head_dim: int) -> int:
    """Channels of a row with padding: a matrix instruction multiplies 16 of a plane's."""
    return max(64, power_of_two(head_dim))


def power_of_two(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def _vectors(head_dim: int) -> int:
    """Vectors that a program of rotation or append has: eight numbers a thread."""
    return max(1, 32 * WARPS * 8 // power_of_two(head_dim))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _key_words(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Rows of codes as words, and as bytes for the high bits of 3; twice as bytes where words of 16 bits do not fit."""
    if bits == 3 and codes.shape[-1] % 2:
        return codes, codes
    return codes.view(KEY_WORD[bits]), codes if bits == 3 else None


def _pointers(part: Dense | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if part is None else (part.keys, part.values, part.lengths, part.first)


def _sizes(part: Dense | None) -> tuple[int, ...]:
    """Slots, and strides of keys and values by batch, slot and head."""
    return (0,) * 7 if part is None else (part.keys.shape[1], *part.keys.stride()[:3], *part.values.stride()[:3])


def _rotation(x: Tensor, mean: Tensor | None, rotate: bool) -> dict[str, Any]:
    """What kernels are told of vectors x [tokens, heads, D] and of R."""
    check_mean(x, mean)
    if (reason := why_not_device(x.device)) is not None:
        raise ValueError(f"x is on {x.device}, where Triton kernels do not run: {reason}")
    tokens, heads, width = x.shape
    odd, log2 = odd_part(width)
    return {
        "x": x,
        "mean": mean,
        "matrix": odd_matrix(width, x.device) if rotate else None,
        "VECTORS": tokens * heads,
        "heads": heads,
        "token_stride": x.stride(0),
        "head_stride": x.stride(1),
        "factor": 1 / math.sqrt(1 << log2),
        "D": width,
        "WIDTH": power_of_two(width),
        "ODD": odd,
        "LOG2": log2,
    }
