"""What the kernels of the packed cache share: the parts that they take a layer's cache as, and the checks of these.

A part is pages, or tokens in 16 bits: first ones (`sinks`), last ones (`window`), those of this call (`fresh`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quant.hartley import hartley_matrix, odd_part
from ..quant.kv_format import PAGE, KVFormat
from ..quant.kv_token import packed_bytes
from ..quant.native import DTYPES
from .kv_rows import KVRows

BITS = (2, 3, 4, 8)
MOST_TOKENS = 16
"""New tokens of one call; above it, decoding pages for a matrix product is faster than reading them in place."""


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


def parts_of(
    rows: KVRows, new: tuple[Tensor, Tensor] | None, skip: NDArray[np.int64], n: int
) -> tuple[Pages, Dense | None, Dense | None, Dense | None]:
    """(pages, sinks, window, fresh tokens); None for a part that the cache has no room for, or no `new` tokens.

    new: keys and values [batch, n, kv_heads, D] of `KVRows.stored`, not yet appended, of which the first skip[b] are
    padding. Both sides of the cache have codes. Lengths and first slots go to the device in one copy.
    """
    form, pool = rows.form, rows.pool
    assert pool.keys.gain is not None and pool.values.gain is not None
    start = rows.exact_start
    numbers = np.stack(
        (
            np.maximum(start - form.sinks, 0),
            np.minimum(rows.lengths, form.sinks),
            np.maximum(rows.lengths - start, 0),
            start % max(rows.capacity, 1),
            n - skip,
            np.minimum(skip, n - 1),
        )
    )
    stored, in_sinks, in_window, window_first, in_fresh, fresh_first = torch.from_numpy(numbers.astype(np.int32)).to(
        rows.device
    )
    codes = (pool.keys.codes, pool.keys.gain, pool.values.codes, pool.values.gain)
    pages = Pages(*codes, form.bits_k, form.bits_v, rows.block_table, stored)
    sinks = Dense(rows.sink_k, rows.sink_v, in_sinks) if form.sinks else None
    window = Dense(rows.ring_k, rows.ring_v, in_window, window_first) if rows.capacity else None
    fresh = None if new is None else Dense(*new, in_fresh, fresh_first)
    return pages, sinks, window, fresh


def why_not_form(who: str, form: KVFormat, head_dims: tuple[int, int], step: int, most: int | None) -> str | None:
    """None where keys and values have the kind "token", bits of `BITS` and head_dims in steps of `step` up to `most`;
    else the reason in words, which begin with `who` has them ("native code has")."""
    if form.kind != "token":
        return f"{who} the kind 'token', not {form.kind!r}"
    for side, bits, width in zip(("keys", "values"), (form.bits_k, form.bits_v), head_dims, strict=True):
        if bits not in BITS:
            return f"{who} {side} of {list(BITS)} bits, not {bits}"
        if width < step or width % step or (most is not None and width > most):
            up_to = "" if most is None else f" up to {most}"
            return f"{who} {side} with a head_dim in steps of {step}{up_to}, not {width}"
    return None


def check_append(x: Tensor, slots: Tensor, codes: Tensor, gain: Tensor, bits: int) -> None:
    """ValueError where x [n, kv_heads, D] cannot go into slots int64 [n] of codes uint8 [pages, kv_heads, 64, D bits /
    8] and gain fp16 [pages, kv_heads, 64]; slots may have a stride."""
    n, kv_heads, head_dim = x.shape
    shape = (codes.shape[0], kv_heads, PAGE, packed_bytes(head_dim, bits))
    pool = (("codes", codes, shape, torch.uint8), ("gain", gain, shape[:3], torch.float16))
    for name, t, wanted, dtype in (*pool, ("slots", slots, (n,), torch.int64)):
        if tuple(t.shape) != wanted or t.dtype != dtype or not (name == "slots" or t.is_contiguous()):
            raise ValueError(
                f"{name} is {t.dtype} {list(t.shape)}; contiguous {dtype} {list(wanted)} is needed for x "
                f"{list(x.shape)} of {bits} bits"
            )


def check_mean(x: Tensor, mean: Tensor | None) -> None:
    """ValueError where keys x [tokens, heads, D] cannot be centered with mean [heads, D]."""
    if mean is not None and (mean.shape != x.shape[1:] or mean.dtype != torch.float32 or not mean.is_contiguous()):
        raise ValueError(f"a mean {mean.dtype} {list(mean.shape)} for tokens {list(x.shape)}; float32 [heads, D]")


def by_heads(x: Tensor, mean: Tensor | None) -> Tensor:
    """x [..., heads, D] as [tokens, heads, D] with the last stride 1; without a mean, heads are tokens."""
    return rows_contiguous(x.reshape(-1, *x.shape[-2:]) if mean is not None else x.reshape(-1, 1, x.shape[-1]))


def odd_matrix(width: int, device: torch.device) -> Tensor | None:
    """The Hartley part of the rotation of `width` elements, float32 [p, p]; None where p = 1."""
    odd = odd_part(width)[0]
    return None if odd == 1 else hartley_matrix(odd, 0, device)


@dataclass(frozen=True)
class Sizes:
    """Of a call to `attend`. dtype: of all tokens in 16 bits; None where there are none."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    kv_heads: int
    head_dim_v: int
    dtype: torch.dtype | None

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the result."""
        return self.batch, self.heads, self.tokens, self.head_dim_v


def sizes_of(q: Tensor, pages: Pages, dense: list[Dense]) -> Sizes:
    """ValueError where queries [batch, heads, n, D] and these parts do not go together, or a kernel would read outside
    of a tensor."""
    batch, heads, n, head_dim = q.shape
    kv_heads = pages.k_codes.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads; a multiple is needed")
    if not 1 <= n <= MOST_TOKENS:
        raise ValueError(f"{n} new tokens; 1 to {MOST_TOKENS} at a time")
    head_dim_v = pages.v_codes.shape[-1] * 8 // pages.bits_v
    check_pages(pages, batch, head_dim, head_dim_v)
    dtype = dense[0].keys.dtype if dense else None
    for part in dense:
        check_dense(part, dense[0].keys.dtype, batch, kv_heads, head_dim, head_dim_v)
    return Sizes(batch, heads, n, head_dim, kv_heads, head_dim_v, dtype)


def address(t: Tensor | None) -> int:
    """What native code is given; 0 for None."""
    return 0 if t is None else t.data_ptr()


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied where its last dimension has a stride or its dtype is none of native code's."""
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def token_numbers(x: Tensor, mean: Tensor | None) -> dict[str, Any]:
    """What native code is told of x [tokens, heads, D] and mean [heads, D]. `x` must outlive the call."""
    check_mean(x, mean)
    return {
        "x": x.data_ptr(),
        "dtype": DTYPES[x.dtype],
        "token_stride": x.stride(0),
        "head_stride": x.stride(1),
        "tokens": x.shape[0],
        "heads": x.shape[1],
        "width": x.shape[2],
        "mean": address(mean),
    }


def dense_numbers(dense: Dense | None) -> tuple[int, ...]:
    """What native code is told of a part in 16 bits: addresses, strides by batch, slot and head, slots; () of none."""
    if dense is None:
        return ()
    k, v = dense.keys, dense.values
    addresses = (address(dense.lengths), address(dense.first))
    return (k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3], *addresses, k.shape[1])


def check_pages(pages: Pages, batch: int, head_dim: int, head_dim_v: int) -> None:
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


def check_dense(dense: Dense, dtype: torch.dtype, batch: int, kv_heads: int, head_dim: int, head_dim_v: int) -> None:
    """ValueError where native code would read outside of a tensor."""
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
