"""What a layer's cached keys and values are stored as: a frozen, validated, JSON-serialisable value.

The kind "token" (quant/kv_token.py) is what this package recommends: one fp16 gain for each token and head, keys
centered and rotated. The others are there to compare with, and read by attention in torch: "channel"
(quant/kv_channel.py) is KIVI's, "bfp32" and "bfp64" (quant/kv_bfp.py) are block floating point. The first `sinks`
tokens and the last `window` tokens keep the model's dtype, and so does a side (keys or values) of 16 bits: its numbers
are the model's own, neither centered nor rotated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BITS = (16, 8, 4, 3, 2)
KINDS = ("token", "channel", "bfp32", "bfp64")
PAGE = 64
"""Tokens of a page."""

GAIN_BYTES = 2
CHANNEL_GROUP = 32
"""Of the kind "channel": tokens (keys) or channels (values) with one scale and minimum (KIVI, arXiv 2402.02750)."""

CHANNEL_GROUP_BYTES = 4
"""fp16 scale and minimum."""

BLOCKS = {"bfp32": 32, "bfp64": 64}
"""{kind: channels of one token and head that share an exponent of one byte}."""


class KVError(ValueError):
    """A format of the cache makes no sense, or the cache cannot do what was asked. The message says what to do."""


@dataclass(frozen=True)
class KVFormat:
    """bits_k, bits_v: of BITS. sinks, window: tokens at the start and at the end that keep the model's dtype."""

    bits_k: int = 4
    bits_v: int = 4
    sinks: int = 4
    window: int = 64
    kind: str = "token"

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v"):
            if getattr(self, name) not in BITS:
                raise KVError(f"{name}={getattr(self, name)!r} is not one of {list(BITS)}")
        for name in ("sinks", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise KVError(f"{name}={value!r} is not a number of tokens, 0 or more")
        if self.kind not in KINDS:
            raise KVError(f"kind={self.kind!r} is not one of {list(KINDS)}")

    @staticmethod
    def parse(text: str, **options: Any) -> KVFormat:
        """The format that "k4v4", "K3V2", "4" (both sides), "16" or, of another kind, "k2v2-channel" names; options:
        sinks, window."""
        match = re.fullmatch(r"(?:k(\d+)v(\d+)|(\d+))(?:-(\w+))?", text.strip().lower())
        if match is None:
            raise KVError(
                f"{text!r} names no format of the cache; say k4v4, k3v2, k8v4, 4 (keys and values), 16 or k2v2-channel"
            )
        k, v, both, kind = match.groups()
        if kind is not None:
            options["kind"] = kind
        return KVFormat(int(k or both), int(v or both), **options)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> KVFormat:
        """The inverse of `to_dict`. KVError names an unknown key."""
        known = {f.name for f in dataclasses.fields(KVFormat)}
        if unknown := sorted(set(values) - known):
            raise KVError(f"a cache format has no {unknown}; it has {sorted(known)}")
        return KVFormat(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, all fields: what a default is may change, what a file says may not."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kind = "" if self.kind == "token" else f" {self.kind}"
        return f"k{self.bits_k}v{self.bits_v}{kind}, {self.sinks} sinks, window {self.window}"

    @property
    def dense(self) -> bool:
        """Nothing is quantized."""
        return self.bits_k == self.bits_v == 16

    @property
    def token_group(self) -> int:
        """Tokens that are quantized together, and so leave the window together."""
        return CHANNEL_GROUP if self.kind == "channel" else 1

    def check_head_dim(self, head_dim: int, head_dim_v: int) -> None:
        """KVError where a row of codes would not be whole bytes (every bit plane of 3 bits needs D / 8 bytes), or
        whole groups or blocks of its kind."""
        value_step = CHANNEL_GROUP if self.kind == "channel" else BLOCKS.get(self.kind, 8)
        for side, bits, width, step in (
            ("keys", self.bits_k, head_dim, BLOCKS.get(self.kind, 8)),
            ("values", self.bits_v, head_dim_v, value_step),
        ):
            if width < 1 or (bits != 16 and width % step):
                kind = "" if self.kind == "token" else f" of the kind {self.kind!r}"
                raise KVError(
                    f"{bits}-bit {side}{kind} need a head_dim in steps of {step}, not {width}; keep this layer at 16 "
                    f"bits{' or of the kind token' if kind and width % 8 == 0 else ''}"
                )

    def bits_per_element(self, head_dim: int, head_dim_v: int | None = None) -> float:
        """Mean over keys and values of a quantized token, with gains: b + 16 / D a side (kind "token"), b + 1
        ("channel"), b + .25 ("bfp32")."""
        width = (head_dim, head_dim if head_dim_v is None else head_dim_v)
        stored = sum(self.row_bytes(bits, d) for bits, d in zip((self.bits_k, self.bits_v), width, strict=True))
        return 8 * stored / sum(width)

    def row_bytes(self, bits: int, head_dim: int) -> float:
        """Bytes of one token and head, one side, with its share of scales."""
        if bits == 16:
            return 2.0 * head_dim
        if self.kind == "channel":
            extra = CHANNEL_GROUP_BYTES * head_dim / CHANNEL_GROUP
        elif self.kind in BLOCKS:
            extra = head_dim / BLOCKS[self.kind]
        else:
            extra = GAIN_BYTES
        return head_dim * bits / 8 + extra
