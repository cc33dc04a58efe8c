"""Cache rows of the kinds to compare with: "channel" (KIVI) and "bfp32", "bfp64" (block floating point).

As `kv_rows.py` otherwise: pages, sinks, window, one quantization of every token. Keys and values are stored as the
model has them, but for the order of key channels of block floating point. Of the kind "channel" 32 tokens leave the
window at once, keys and values, so it holds window .. window + 31 tokens. KIVI's own code empties a window of 128 keys
at once and leaves 0 .. 127; this is the kinder reading. Scales and exponents stand beside the codes:

    channel  keys  fp16 [pages, kv_heads, 2, D, 2]: scale and minimum of a page's two groups of tokens
             values  fp16 [pages, kv_heads, 64, D / 32, 2]
    bfp      exponents uint8 [pages, kv_heads, 64, D / block]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..quant.kv_bfp import decode as decode_blocks
from ..quant.kv_bfp import encode as encode_blocks
from ..quant.kv_channel import decode_keys, decode_values, encode_keys, encode_values
from ..quant.kv_format import BLOCKS, CHANNEL_GROUP, PAGE, KVError, KVFormat
from ..quant.kv_token import pack, packed_bytes, unpack
from .kv_pages import Encoder, PagePool, Side
from .kv_rows import Ints, KVRows


def rows_class(form: KVFormat) -> type[KVRows]:
    """What holds a cache of this format."""
    return KVRows if KVRows.holds(form) else GroupRows


class GroupRows(KVRows):
    """order: int64 [kv_heads, D], the channels of keys in the order in which blocks take them; None: the model's."""

    def __init__(self, *arguments: Any, order: Tensor | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.mean is not None:
            raise KVError(f"keys of the kind {self.form.kind!r} are not centered; leave the means of this layer out")
        shape = (self.kv_heads, self.head_dim)
        if order is not None and self.form.kind not in BLOCKS:
            raise KVError(f"keys of the kind {self.form.kind!r} have no order of channels; leave it out")
        if order is not None and not torch.equal(order.sort(-1).values, torch.arange(shape[1]).expand(shape)):
            raise KVError(f"an order {list(order.shape)} does not list every channel of {list(shape)} once a head")
        self.order = None if order is None or self.form.bits_k == 16 else order.to(self.device)

    @staticmethod
    def holds(form: KVFormat) -> bool:
        return form.kind != "token"

    def _pool(self) -> PagePool:
        def side(bits: int, width: int, key: bool) -> Side:
            shape = (bits, self.kv_heads, width, self.dtype, self.device)
            if bits == 16:
                return Side(bits, self.kv_heads, width, key, self.dtype, self.device)
            if self.form.kind in BLOCKS:
                return BlockSide(*shape, block=BLOCKS[self.form.kind])
            return ChannelKeys(*shape) if key else ChannelValues(*shape)

        form = self.form
        form.check_head_dim(self.head_dim, self.head_dim_v)
        sides = side(form.bits_k, self.head_dim, True), side(form.bits_v, self.head_dim_v, False)
        return PagePool(form, self.kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.device, sides)

    def _packed_until(self, lengths: Ints) -> Ints:
        group = self.form.token_group
        past = lengths - self.form.window - self.form.sinks
        return self.form.sinks + past // group * group

    def _ordered(self, x: Tensor, heads: int) -> Tensor:
        """x [batch, heads, n, D] with the channels of its key head in their order."""
        if self.order is None:
            return x
        order = self.order.repeat_interleave(heads // self.kv_heads, 0)[None, :, None]
        return x.gather(-1, order.expand(*x.shape[:3], -1))

    def rotated_query(self, q: Tensor) -> Tensor:
        return self._ordered(q, q.shape[1])

    def rotated_back(self, out: Tensor) -> Tensor:
        return out

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key = self._ordered(key, self.kv_heads)
        return key.transpose(1, 2).to(self.dtype), value.transpose(1, 2).to(self.dtype)

    def crop(self, tokens: int) -> None:
        """As of `KVRows`. KVError where it would leave a part of a packed group, which cannot be packed again."""
        sinks, group = self.form.sinks, self.form.token_group
        left = np.maximum(self.lengths - tokens, 0)
        last = np.minimum(self.quantized, left)
        start = np.maximum(sinks + (last - sinks) // group * group, sinks)  # of the group that is cut
        cut = last > start
        if (cut & (self.exact_from > start)).any():
            raise KVError(
                f"crop({-tokens}) ends inside {group} tokens that are packed together; crop less, or use the kind "
                "'token'"
            )
        super().crop(tokens)
        self.quantized = np.where(cut, start, self.quantized)


class ScaledSide(Side):
    """Rows of codes as `kv_token.pack` writes them, and scales in `gain`."""

    gain: Tensor

    def __init__(
        self,
        bits: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: tuple[int, ...],
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        self.bits, self.head_dim, self.unbiased = bits, head_dim, False
        self.codes = torch.zeros(0, kv_heads, PAGE, packed_bytes(head_dim, bits), dtype=torch.uint8, device=device)
        self.gain = torch.zeros(0, kv_heads, *scales, dtype=scale_dtype, device=device)

    def write(self, slots: Tensor, x: Tensor, encoder: Encoder | None = None) -> None:
        raise NotImplementedError

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, pages: Tensor) -> Tensor:
        x = self._decoded(unpack(self.codes[pages], self.bits), self.gain[pages])
        return x.transpose(1, 2).flatten(2, 3)


class ChannelKeys(ScaledSide):
    def __init__(self, bits: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(bits, kv_heads, head_dim, dtype, device, (PAGE // CHANNEL_GROUP, head_dim, 2))

    def write(self, slots: Tensor, x: Tensor, encoder: Encoder | None = None) -> None:
        """x [tokens, kv_heads, D]: whole groups, each the 32 tokens of half a page."""
        groups = slots.view(-1, CHANNEL_GROUP)
        codes, scales = encode_keys(x.unflatten(0, (-1, CHANNEL_GROUP)).transpose(1, 2), self.bits)
        self.codes[slots // PAGE, :, slots % PAGE] = pack(codes, self.bits).transpose(1, 2).flatten(0, 1)
        first = groups[:, 0]
        self.gain[first // PAGE, :, first % PAGE // CHANNEL_GROUP] = scales[:, :, 0]

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        return decode_keys(codes, scales)


class ChannelValues(ScaledSide):
    def __init__(self, bits: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(bits, kv_heads, head_dim, dtype, device, (PAGE, head_dim // CHANNEL_GROUP, 2))

    def write(self, slots: Tensor, x: Tensor, encoder: Encoder | None = None) -> None:
        codes, scales = encode_values(x, self.bits)
        self.codes[slots // PAGE, :, slots % PAGE] = pack(codes, self.bits)
        self.gain[slots // PAGE, :, slots % PAGE] = scales

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        return decode_values(codes, scales)


class BlockSide(ScaledSide):
    def __init__(
        self, bits: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, block: int
    ) -> None:
        super().__init__(bits, kv_heads, head_dim, dtype, device, (PAGE, head_dim // block), torch.uint8)
        self.block = block

    def write(self, slots: Tensor, x: Tensor, encoder: Encoder | None = None) -> None:
        codes, exponents = encode_blocks(x, self.bits, self.block)
        self.codes[slots // PAGE, :, slots % PAGE] = pack(codes, self.bits)
        self.gain[slots // PAGE, :, slots % PAGE] = exponents

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        return decode_blocks(codes, scales, self.bits)
