"""The cache format "channel": KIVI's (arXiv 2402.02750), to compare with. Asymmetric codes of b bits in groups of 32:

    keys    32 tokens of one channel      [head, token, D]: groups along tokens
    values  32 channels of one token      groups along D

    low = fp16(min x),   scale = fp16((max x - min x) / (2^b - 1)),   c = clamp(round((x - low) / scale), 0, 2^b - 1)
    stored value = low + scale c

Neither centered nor rotated. Two fp16 a group of 32 are one bit an element: 3.0 bits at b = 2, 5.0 at b = 4.

Minimum and scale are rounded to fp16 before the codes are chosen, so a code is the nearest of what can be read. Equal
numbers have scale 0 and code 0, where the paper's division gives NaN. A group with a NaN or an infinity is stored as
NaN. Rounding is to even at ties; minimum and scale beyond fp16 are stored as its largest number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_format import CHANNEL_GROUP

LARGEST = 65504.0
"""Of fp16."""


def encode_keys(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., t, D], groups fp16 [..., t / 32, D, 2]: scale and minimum) of keys x [..., t, D], t in steps
    of 32."""
    grouped = x.unflatten(-2, (-1, CHANNEL_GROUP)).transpose(-1, -2)  # [..., t / 32, D, 32]
    codes, groups = _encode(grouped, bits)
    return codes.transpose(-1, -2).flatten(-3, -2), groups


def decode_keys(codes: Tensor, groups: Tensor) -> Tensor:
    """The inverse: float32 [..., t, D]."""
    grouped = codes.unflatten(-2, (-1, CHANNEL_GROUP)).float()  # [..., t / 32, 32, D]
    scale, low = groups.float()[..., None, :, :].unbind(-1)
    return (low + scale * grouped).flatten(-3, -2)


def encode_values(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., D], groups fp16 [..., D / 32, 2]: scale and minimum) of values x [..., D], D in steps of
    32."""
    codes, groups = _encode(x.unflatten(-1, (-1, CHANNEL_GROUP)), bits)
    return codes.flatten(-2), groups


def decode_values(codes: Tensor, groups: Tensor) -> Tensor:
    """The inverse: float32 [..., D]."""
    scale, low = groups.float()[..., None, :].unbind(-1)
    return (low + scale * codes.unflatten(-1, (-1, CHANNEL_GROUP)).float()).flatten(-2)


def _encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., 32] -> (codes uint8 [..., 32], fp16 [..., 2])."""
    x = x.float()
    most = (1 << bits) - 1
    smallest, largest = x.amin(-1), x.amax(-1)  # both keep a NaN
    low = smallest.clamp(-LARGEST, LARGEST).half()
    scale = ((largest - smallest) / most).clamp(max=LARGEST).half()
    finite = (largest - smallest).isfinite()
    divisor = torch.where(finite & (scale > 0), scale.float(), 1.0)[..., None]
    position = torch.where(finite[..., None], (x - low.float()[..., None]) / divisor, 0.0)
    position = torch.where((scale > 0)[..., None], position, 0.0)
    codes = position.round_().clamp_(0, most).to(torch.uint8)
    return codes, torch.where(finite[..., None], torch.stack((scale, low), -1), float("nan"))
