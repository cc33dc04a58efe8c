"""Codec `int`: uniform levels of 1 to 8 bits, value = (code - zero_point) * scale.

Scales are fp16, one for each output row (group_size 0), for each group of columns of a row, or for each input
channel. Symmetric: the zero point is 2**(bits-1), not stored (1 bit: 1/2, the levels are -scale/2 and +scale/2); the
scale may be negative, so that the longer side of the levels can serve either sign. Asymmetric: a zero point of `bits`
bits for each scale, packed as `bitstream.py` packs codes. Progressive (4 bits in groups): a group's scale is a whole
number times its row's, value = scale * ((code - zero_point) * group_scale), whose parenthesis is an int8 of at most
119 in size: what a product of int8 by int8 takes (`int_progressive.py`).

    codes       uint8 [out * row_bytes(in, bits)]     rows one after another
    scale       float16 [out, groups]                 per input channel: [1, in]; progressive: [out, 1]
    group_scale uint8 [out, groups]                   progressive only
    zero_point  uint8 [out, row_bytes(groups, bits)]  asymmetric only; per input channel: [1, row_bytes(in, bits)]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bitstream import pack_bits, row_bytes, unpack_bits
from .clipping import least_error_scale
from .codec import Fields, group_count, group_of_column
from .scheme import Scheme, SchemeError, check_flag, check_integer
from .tensor import QuantizedTensor

CHUNK = 1 << 22
"""Weights decoded at a time: temporaries of 16 MiB."""


@dataclass(frozen=True)
class IntScheme(Scheme):
    """bits 1..8; group_size in columns, 0 for the whole row; symmetric; per_input_channel: one scale a column;
    progressive: whole-numbered group scales under one a row, for 4 bits in groups."""

    codec: ClassVar[str] = "int"
    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    per_input_channel: bool = False
    progressive: bool = False

    def validate(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        check_integer("group_size", self.group_size, 0)
        check_flag("symmetric", self.symmetric)
        check_flag("per_input_channel", self.per_input_channel)
        if 0 < self.group_size < 8:
            raise SchemeError(f"group_size is 0 (whole row) or at least 8 columns; got {self.group_size}")
        if self.per_input_channel and self.group_size:
            raise SchemeError(f"per_input_channel and group_size {self.group_size} exclude each other")
        check_flag("progressive", self.progressive)
        if self.progressive and not (self.bits == 4 and self.group_size):
            raise SchemeError(f"progressive needs bits 4 and a group_size; got {self.bits} and {self.group_size}")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        if self.group_size > shape[1]:
            raise SchemeError(f"group_size {self.group_size} is wider than the weight's {shape[1]} columns")

    @property
    def zero(self) -> float:
        """The zero point of symmetric levels."""
        return 0.5 if self.bits == 1 else float(1 << (self.bits - 1))


class IntGrid:
    """Scales and zero points of one matrix. Internally [rows, groups], where per input channel rows is 1."""

    def __init__(self, scheme: IntScheme, shape: tuple[int, int], device: torch.device) -> None:
        self.scheme, self.shape = scheme, shape
        self.group_size = 1 if scheme.per_input_channel else scheme.group_size
        self.group = group_of_column(shape[1], self.group_size, device)
        self._group_list: list[int] = self.group.tolist()
        rows = 1 if scheme.per_input_channel else shape[0]
        groups = group_count(shape[1], self.group_size)
        self.scale = torch.zeros(rows, groups, dtype=torch.float32, device=device)
        self.zero = torch.full_like(self.scale, scheme.zero)
        self.divisor = torch.ones_like(self.scale)  # the scale, and 1 where that is 0: the code is the zero point then

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        if self.scheme.per_input_channel:
            self.scale, self.zero = (t.T.contiguous() for t in _fit(self.scheme, w.T[:, None, :], None))
            self.divisor = self._divisor(self.scale)
            return
        gs = self.group_size or self.shape[1]
        whole = self.shape[1] // gs * gs
        if whole:
            weight = None if importance is None else importance[:whole].view(-1, gs)
            fitted = _fit(self.scheme, w[:, :whole].reshape(self.shape[0], -1, gs), weight)
            self.scale[:, : whole // gs], self.zero[:, : whole // gs] = fitted
            self.divisor = self._divisor(self.scale)
        if whole < self.shape[1]:  # a short last group
            self._fit_alone(w[:, whole:], whole // gs, None if importance is None else importance[whole:])

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        self._fit_alone(w, group, importance)

    def _fit_alone(self, w: Tensor, group: int, importance: Tensor | None) -> None:
        """As `fit`, for one group."""
        if self.scheme.per_input_channel:
            scale, zero = _fit(self.scheme, w.T[:, None, :], None)
        else:
            scale, zero = _fit(self.scheme, w[:, None, :], None if importance is None else importance[None, :])
        self.scale[:, group], self.zero[:, group] = scale[:, 0], zero[:, 0]
        self.divisor[:, group] = self._divisor(scale[:, 0])

    @staticmethod
    def _divisor(scale: Tensor) -> Tensor:
        return torch.where(scale == 0, 1.0, scale)

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        if columns.numel() == 1:  # the inner loop of error feedback: views in place of copies
            at = self._group_list[int(columns)]
            group: slice | Tensor = slice(at, at + 1)
        else:
            group = self.group[columns]
        scale, zero = self.scale[:, group], self.zero[:, group]
        code = (w / self.divisor[:, group]).add_(zero + 0.5).floor_().clamp_(0, (1 << self.scheme.bits) - 1)
        return code.to(torch.uint8).expand(w.shape), (code - zero).mul_(scale)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields = {
            "codes": pack_bits(codes, self.scheme.bits).flatten(),
            "scale": self.scale.to(torch.float16),
        }
        if not self.scheme.symmetric:
            fields["zero_point"] = pack_bits(self.zero.to(torch.uint8), self.scheme.bits)
        return fields


def _fit(scheme: IntScheme, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of least error, float32 [rows, groups], for w [rows, groups, n]; importance [groups, n]."""
    top = (1 << scheme.bits) - 1

    def level(u: Tensor, zero: Tensor) -> Tensor:
        return u.add_(zero + 0.5).floor_().clamp_(0, top).sub_(zero)

    low, high = w.amin(-1), w.amax(-1)
    if not scheme.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / top
        zero = torch.where(scale == 0, scale, torch.round(-low / scale)).clamp_(0, top)
        return least_error_scale(w, level, [(scale, zero)], importance, zero_top=top)
    zero = torch.full_like(low, scheme.zero)
    if scheme.progressive:  # a whole number has no sign to choose a side with
        return least_error_scale(w, level, [(torch.maximum(high / (top - zero), -low / zero), zero)], importance)
    scale = torch.maximum(high, -low) / zero
    if scheme.bits > 1:
        # the level farthest from zero is on the negative side: the scale's sign gives it to either side of the weights
        sign = torch.where(high > -low, -1.0, 1.0)
        return least_error_scale(w, level, [(sign * scale, zero), (-sign * scale, zero)], importance)
    return least_error_scale(w, level, [(scale, zero)], importance)


class IntCodec:
    name = "int"
    scheme_class = IntScheme
    rows_together = 1

    def fields(self, scheme: IntScheme, shape: tuple[int, int]) -> Fields:
        out, n = shape
        rows, groups = (1, n) if scheme.per_input_channel else (out, group_count(n, scheme.group_size))
        fields: Fields = {
            "codes": ((out * row_bytes(n, scheme.bits),), torch.uint8),
            "scale": ((rows, 1 if scheme.progressive else groups), torch.float16),
        }
        if scheme.progressive:
            fields["group_scale"] = ((rows, groups), torch.uint8)
        if not scheme.symmetric:
            fields["zero_point"] = ((rows, row_bytes(groups, scheme.bits)), torch.uint8)
        return fields

    def grid(self, scheme: IntScheme, shape: tuple[int, int], device: torch.device) -> IntGrid:
        if scheme.progressive:
            from .int_progressive import ProgressiveGrid  # builds on IntGrid

            return ProgressiveGrid(scheme, shape, device)
        return IntGrid(scheme, shape, device)

    def decode(self, qt: QuantizedTensor) -> Tensor:
        scheme = qt.scheme
        assert isinstance(scheme, IntScheme)
        out, n = qt.shape
        codes = qt.fields["codes"].view(out, -1)
        scale = qt.fields["scale"].float()
        if scheme.progressive:
            scale = scale * qt.fields["group_scale"].float()
        if scheme.symmetric:
            zero = torch.full_like(scale, scheme.zero)
        else:
            zero = unpack_bits(qt.fields["zero_point"], scale.shape[1], scheme.bits).float()
        group = group_of_column(n, 1 if scheme.per_input_channel else scheme.group_size, codes.device)
        zero, scale = zero.expand(out, -1), scale.expand(out, -1)
        w = torch.empty(out, n, device=codes.device)
        for rows in torch.arange(out, device=codes.device).split(max(1, CHUNK // n)):  # temporaries stay small
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            levels = unpack_bits(codes[part], n, scheme.bits).float().sub_(zero[part][:, group])
            torch.mul(levels, scale[part][:, group], out=w[part])
        return w

    def tolerance(self, scheme: IntScheme) -> float:
        return 0.02


CODEC = IntCodec()
