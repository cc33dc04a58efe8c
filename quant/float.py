"""Codec `float`: small floating point levels, value = element(code) * scale.

Elements are e2m1 (4 bits), e2m3 and e3m2 (6 bits) and e4m3 (8 bits); `minifloat.py` has their codes. Scales are fp16
for a row or a group of columns ("fp16"), or those of two block formats:

    scale_format  group_size   elements   known as
    fp16          0, 8, ...    all        fp8 with a scale a channel (e4m3, 0), fp4 in groups
    e8m0          32           all        MXFP4, MXFP6, MXFP8 (OCP Microscaling Formats specification 1.0, section 5)
    e4m3          16           e2m1       NVFP4: under the blocks' scales one for the tensor

    codes         uint8 [out * row_bytes(in, bits)]  rows one after another, packed as `bitstream.py` says
    scale         float16 [out, groups]; e8m0 and e4m3: their codes, uint8 [out, groups]
    tensor_scale  float32 [1], for e4m3 only         scale of a block = e4m3(scale) * tensor_scale, in float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bitstream import pack_bits, row_bytes, unpack_bits
from .clipping import least_error_scale
from .codec import Fields, group_count, group_of_column
from .minifloat import E4M3, ELEMENTS, Minifloat, e8m0_codes, e8m0_values, round_to_power_of_two
from .scheme import Scheme, SchemeError, check_integer
from .tensor import QuantizedTensor

BLOCKS = {"e8m0": 32, "e4m3": 16}
"""Columns of a block by the format of its scale."""

SCALE_FORMATS = ("fp16", *BLOCKS)

POWERS = (1.0, 0.5, 0.25)
"""Of the power of two that covers every weight: clipping more than half the range away never paid."""

CHUNK = 1 << 22
"""Weights decoded at a time: temporaries of 16 MiB."""


@dataclass(frozen=True)
class FloatScheme(Scheme):
    """element: see `minifloat.ELEMENTS`; group_size in columns, 0 for the whole row; scale_format: `SCALE_FORMATS`."""

    codec: ClassVar[str] = "float"
    element: str = "e2m1"
    group_size: int = 0
    scale_format: str = "fp16"

    def validate(self) -> None:
        if self.element not in ELEMENTS:
            raise SchemeError(f"element is one of {list(ELEMENTS)}; got {self.element!r}")
        if self.scale_format not in SCALE_FORMATS:
            raise SchemeError(f"scale_format is one of {list(SCALE_FORMATS)}; got {self.scale_format!r}")
        check_integer("group_size", self.group_size, 0)
        if 0 < self.group_size < 8:
            raise SchemeError(f"group_size is 0 (whole row) or at least 8 columns; got {self.group_size}")
        block = BLOCKS.get(self.scale_format)
        if block is not None and self.group_size != block:
            raise SchemeError(f"scale_format {self.scale_format!r} has group_size {block}; got {self.group_size}")
        if self.scale_format == "e4m3" and self.element != "e2m1":
            raise SchemeError(f"scale_format 'e4m3' scales elements e2m1 (NVFP4); got {self.element!r}")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        if self.group_size > shape[1]:
            raise SchemeError(f"group_size {self.group_size} is wider than the weight's {shape[1]} columns")

    @property
    def format(self) -> Minifloat:
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.format.bits


class FloatGrid:
    """Scales [out, groups] of one matrix, as they are stored; e4m3: in units of `tensor_scale`, which `fit` chooses."""

    def __init__(self, scheme: FloatScheme, shape: tuple[int, int], device: torch.device) -> None:
        self.scheme, self.shape = scheme, shape
        self.group_size = scheme.group_size
        self.group = group_of_column(shape[1], self.group_size, device)
        groups = group_count(shape[1], self.group_size)
        self.scale = torch.zeros(shape[0], groups, dtype=torch.float32, device=device)
        self.tensor_scale = torch.ones(1, dtype=torch.float32, device=device)
        self.table = scheme.format.values.to(device)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        if self.scheme.scale_format == "e4m3":  # the block with the largest weight has the largest scale
            unit = w.abs().amax() / (self.scheme.format.largest * E4M3.largest)
            tiny = torch.finfo(torch.float32).tiny
            self.tensor_scale = torch.where(unit == 0, 1.0, unit.clamp(min=tiny)).reshape(1).float()
        gs = self.group_size or self.shape[1]
        whole = self.shape[1] // gs * gs
        if whole:
            weight = None if importance is None else importance[:whole].view(-1, gs)
            self.scale[:, : whole // gs] = self._best_scale(w[:, :whole].reshape(self.shape[0], -1, gs), weight)
        if whole < self.shape[1]:  # a short last group
            self.fit_group(w[:, whole:], whole // gs, None if importance is None else importance[whole:])

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        """As the protocol says; the tensor's scale stays as `fit` made it."""
        best = self._best_scale(w[:, None, :], None if importance is None else importance[None])
        self.scale[:, group] = best[:, 0]

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        scale = (self.scale * self.tensor_scale)[:, self.group[columns]]
        code = self.scheme.format.encode(w / torch.where(scale == 0, torch.inf, scale))
        return code, self.table[code.int()] * scale

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields = {"codes": pack_bits(codes, self.scheme.bits).flatten()}
        if self.scheme.scale_format == "fp16":
            fields["scale"] = self.scale.to(torch.float16)
        elif self.scheme.scale_format == "e8m0":
            fields["scale"] = e8m0_codes(self.scale)
        else:
            fields["scale"], fields["tensor_scale"] = E4M3.encode(self.scale), self.tensor_scale.clone()
        return fields

    def _best_scale(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Scales of least error [rows, groups] for w [rows, groups, n]."""
        element, scale_format = self.scheme.format, self.scheme.scale_format

        def level(u: Tensor, zero: Tensor) -> Tensor:
            return element.round(u)

        start = w.abs().amax(-1) / element.largest
        zero = torch.zeros_like(start)
        if scale_format == "fp16":
            return least_error_scale(w, level, [(start, zero)], importance)[0]
        if scale_format == "e8m0":
            power = round_to_power_of_two(start)
            power = torch.where(power < start, 2 * power, power)
            one = torch.ones_like(power)  # in units of the covering power: squares of weights of any size are finite
            relative = w / power[..., None]
            part = least_error_scale(
                relative, level, [(one, zero)], importance, ladder=POWERS, as_stored=round_to_power_of_two
            )[0]
            return round_to_power_of_two(power * part)  # a product may be below the least of them
        start = (start / self.tensor_scale).clamp(max=E4M3.largest)
        return least_error_scale(w / self.tensor_scale, level, [(start, zero)], importance, as_stored=E4M3.round)[0]


def group_scales(scheme: FloatScheme, fields: dict[str, Tensor]) -> Tensor:
    """The scale of every group, float32 [out, groups], from the stored fields."""
    if scheme.scale_format == "fp16":
        return fields["scale"].float()
    if scheme.scale_format == "e8m0":
        return e8m0_values(fields["scale"])
    return E4M3.values.to(fields["scale"].device)[fields["scale"].int()] * fields["tensor_scale"]


class FloatCodec:
    name = "float"
    scheme_class = FloatScheme
    rows_together = 1

    def fields(self, scheme: FloatScheme, shape: tuple[int, int]) -> Fields:
        out, n = shape
        scale = torch.float16 if scheme.scale_format == "fp16" else torch.uint8
        fields: Fields = {
            "codes": ((out * row_bytes(n, scheme.bits),), torch.uint8),
            "scale": ((out, group_count(n, scheme.group_size)), scale),
        }
        if scheme.scale_format == "e4m3":
            fields["tensor_scale"] = ((1,), torch.float32)
        return fields

    def grid(self, scheme: FloatScheme, shape: tuple[int, int], device: torch.device) -> FloatGrid:
        return FloatGrid(scheme, shape, device)

    def decode(self, qt: QuantizedTensor) -> Tensor:
        scheme = qt.scheme
        assert isinstance(scheme, FloatScheme)
        out, n = qt.shape
        codes = qt.fields["codes"].view(out, -1)
        table, scale = scheme.format.values.to(codes.device), group_scales(scheme, qt.fields)
        group = group_of_column(n, scheme.group_size, codes.device)
        w = torch.empty(out, n, device=codes.device)
        step = max(1, CHUNK // n)
        for first in range(0, out, step):  # temporaries stay small
            part = slice(first, first + step)
            torch.mul(table[unpack_bits(codes[part], n, scheme.bits).int()], scale[part][:, group], out=w[part])
        return w

    def tolerance(self, scheme: FloatScheme) -> float:
        return 0.02


CODEC = FloatCodec()
