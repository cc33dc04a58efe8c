"""Codec `lut`: levels from a table of 4 to 256 entries, value = table[code] * scale.

Tables: "nf4" (QLoRA), "lloyd" (Lloyd-Max for N(0, 1): right after a rotation), "kmeans" (fitted to the matrix, one
table or one a row as in SqueezeLLM) and "values" (given in the scheme). With dims = 2 the entries are points in the
plane, least squares for N(0, I) ("lloyd"), and one code stands for two neighbouring columns (HIGGS): `lut_pairs.py`.

    codes  uint8 [out * row_bytes(in, bits)]   bits = ceil(log2 entries); rows one after another
                                               dims 2: row_bytes(ceil(in / 2), bits)
    table  float16 [entries], ascending        table_scope "row": [out, entries]; dims 2: [entries, 2]
    scale  float16 [out, groups]               may be negative: the table's longer side serves either sign
                                               (not stored with scaled = false: the table is in units of the weights)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from .bitstream import pack_bits, row_bytes, unpack_bits
from .clipping import LADDER, chunk_rows, least_error_scale
from .codec import Fields, Grid, group_count, group_of_column
from .lloyd import kmeans_1d, lloyd_max
from .lut_pairs import PairGrid
from .scheme import Scheme, SchemeError, check_flag, check_integer
from .tensor import QuantizedTensor

TABLES = ("nf4", "lloyd", "kmeans", "values")
SCOPES = ("tensor", "row")

STRETCH = (1.6, 1.45, 1.32, 1.2, 1.1)
"""Of the scale that covers every weight, tried besides `LADDER`: a table that is dense near zero gains there."""

_SAMPLE = 1 << 18
"""Weights, evenly spaced, that one table for a whole tensor is fitted to."""

_ROUNDS = 2
"""Of fitting a k-means table for given scales, then the scales for the table."""


@dataclass(frozen=True)
class LutScheme(Scheme):
    """entries 4..256; table, see `TABLES`; values: the table "values" itself, ascending; table_scope: "tensor", or
    "row" for k-means; group_size in columns, 0 for the whole row; scaled: false only for "kmeans" and "values"; dims:
    columns that one code stands for, 1, or 2 with the table "lloyd"."""

    codec: ClassVar[str] = "lut"
    entries: int = 16
    table: str = "lloyd"
    values: tuple[float, ...] = ()
    table_scope: str = "tensor"
    group_size: int = 0
    scaled: bool = True
    dims: int = 1

    def validate(self) -> None:
        check_integer("entries", self.entries, 4, 256)
        check_integer("group_size", self.group_size, 0)
        check_flag("scaled", self.scaled)
        check_integer("dims", self.dims, 1, 2)
        if self.table not in TABLES:
            raise SchemeError(f"table is one of {list(TABLES)}; got {self.table!r}")
        if self.table_scope not in SCOPES:
            raise SchemeError(f"table_scope is one of {list(SCOPES)}; got {self.table_scope!r}")
        if 0 < self.group_size < 8:
            raise SchemeError(f"group_size is 0 (whole row) or at least 8 columns; got {self.group_size}")
        if self.table == "nf4" and self.entries != 16:
            raise SchemeError(f'the table "nf4" has 16 entries; got entries {self.entries}')
        if self.table_scope == "row" and self.table != "kmeans":
            raise SchemeError(f'table_scope "row" needs the table "kmeans"; got {self.table!r}')
        if not self.scaled and self.table not in ("kmeans", "values"):
            raise SchemeError(f'scaled false needs the table "kmeans" or "values"; got {self.table!r}')
        if not self.scaled and self.group_size:
            raise SchemeError(f"group_size {self.group_size} says which columns share a scale; scaled is false")
        if self.dims == 2 and self.table != "lloyd":
            raise SchemeError(f'dims 2 needs the table "lloyd"; got {self.table!r}')
        if self.dims == 2 and self.group_size % 2:
            raise SchemeError(f"dims 2 codes pairs of columns: group_size is even; got {self.group_size}")
        self._validate_values()

    def _validate_values(self) -> None:
        if not isinstance(self.values, (tuple, list)):
            raise SchemeError(f"values is a list of numbers; got {self.values!r}")
        object.__setattr__(self, "values", tuple(self.values))
        if self.table != "values":
            if self.values:
                raise SchemeError(f'values are given but the table is {self.table!r}, not "values"')
            return
        if len(self.values) != self.entries:
            raise SchemeError(f"values has {len(self.values)} numbers, entries is {self.entries}")
        for v in self.values:
            if isinstance(v, bool) or not isinstance(v, (int, float)) or not abs(v) <= 65504:
                raise SchemeError(f"values are numbers within fp16's -65504 to 65504; got {v!r}")
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        stored = torch.tensor(self.values, dtype=torch.float16, device="cpu")
        if not bool((stored.diff() > 0).all()):
            raise SchemeError("values are not ascending and distinct in fp16")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        if self.group_size > shape[1]:
            raise SchemeError(f"group_size {self.group_size} is wider than the weight's {shape[1]} columns")

    @property
    def block(self) -> int:
        return self.dims

    @property
    def bits(self) -> int:
        """Bits of one code, which stands for `dims` weights."""
        return (self.entries - 1).bit_length()


@cache
def nf4() -> tuple[float, ...]:
    """The 16 levels of NormalFloat (QLoRA, arXiv 2305.14314, section 3 and appendix E), ascending, -1 to 1.

    Quantiles of N(0, 1): 8 levels above zero and 7 below, evenly spaced in probability from an outermost quantile
    halfway between those of 16 and of 15 levels, 1 - (1/32 + 1/30) / 2; and an exact zero; over the largest.
    """
    outer = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(outer + (0.5 - outer) * i / 8) for i in range(8)]
    below = [-quantile(outer + (0.5 - outer) * i / 7) for i in range(7)]
    return tuple(v / above[0] for v in sorted([*below, 0.0, *above]))


def _fixed_levels(scheme: LutScheme) -> tuple[float, ...]:
    """The levels that the scheme alone decides; none for k-means."""
    if scheme.table == "nf4":
        return nf4()
    return lloyd_max(scheme.entries) if scheme.table == "lloyd" else scheme.values


class LutGrid:
    """The table [tables, entries] (one, or one a row) and scales [out, groups] of one matrix; all fp16 values."""

    def __init__(self, scheme: LutScheme, shape: tuple[int, int], device: torch.device) -> None:
        self.scheme, self.shape = scheme, shape
        self.group_size = scheme.group_size
        self.group = group_of_column(shape[1], self.group_size, device)
        self.scale = torch.ones(shape[0], group_count(shape[1], self.group_size), dtype=torch.float32, device=device)
        self.table: Tensor | None = None  # k-means: comes from `fit`
        fixed = _fixed_levels(scheme)
        if fixed:
            self.set_table(torch.tensor(fixed, dtype=torch.float64, device=device)[None])

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        if self.scheme.table == "kmeans":
            rms = self._by_group(w.square()) / self._by_group(torch.ones_like(w[:1]))
            if self.scheme.scaled:
                self.scale = rms.sqrt().to(torch.float16).float()
            for _ in range(_ROUNDS if self.scheme.scaled else 1):
                self.set_table(self._kmeans(w, importance))
                self._fit_scales(w, importance)
        else:
            self._fit_scales(w, importance)

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        """As the protocol says; a k-means table stays as `fit` made it, only the scales are the group's own."""
        if self.scheme.scaled:
            self.scale[:, group] = self._best_scale(w[:, None, :], None if importance is None else importance[None])[
                :, 0
            ]

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        if not self.scheme.scaled:
            code = self._codes(w, self._levels())
            return code.to(torch.uint8), self._values(code, self._levels())
        scale = self.scale[:, self.group[columns]]
        code = self._codes(w * _inverse(scale), self._levels())
        return code.to(torch.uint8), self._values(code, self._levels()) * scale

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        table = self._levels().to(torch.float16)
        fields = {
            "codes": pack_bits(codes, self.scheme.bits).flatten(),
            "table": table if self.scheme.table_scope == "row" else table[0],
        }
        if self.scheme.scaled:
            fields["scale"] = self.scale.to(torch.float16)
        return fields

    def _levels(self) -> Tensor:
        if self.table is None:
            raise RuntimeError("a k-means table comes from `fit`; call it first")
        return self.table

    def set_table(self, levels: Tensor) -> None:
        """Take these levels [tables, entries], ascending, as fp16. SchemeError where they do not fit in it."""
        stored = levels.to(torch.float16).float()
        if not bool(stored.isfinite().all()):
            raise SchemeError(f"table entries up to {float(levels.abs().max()):.3g} do not fit in fp16")
        self.table = stored

    def _kmeans(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Levels for the scales as they are, [1 or out, entries]."""
        weight = torch.ones_like(w[:1]) if importance is None else importance[None].to(w.dtype)
        if self.scheme.scaled:
            scale = self.scale[:, self.group]
            w, weight = w * _inverse(scale), weight * scale.square()
        weight = weight / weight.max().clamp(min=torch.finfo(w.dtype).tiny) + 1e-12  # none may vanish altogether
        if self.scheme.table_scope == "row":
            return kmeans_1d(w, weight, self.scheme.entries)
        step = -(-w.numel() // _SAMPLE)
        flat = weight.expand(w.shape).reshape(1, -1)
        return kmeans_1d(w.reshape(1, -1)[:, ::step], flat[:, ::step], self.scheme.entries)

    def _fit_scales(self, w: Tensor, importance: Tensor | None) -> None:
        if not self.scheme.scaled:
            return
        gs = self.group_size or self.shape[1]
        whole = self.shape[1] // gs * gs
        if whole:
            weight = None if importance is None else importance[:whole].view(-1, gs)
            self.scale[:, : whole // gs] = self._best_scale(w[:, :whole].reshape(self.shape[0], -1, gs), weight)
        if whole < self.shape[1]:  # a short last group
            self.fit_group(w[:, whole:], whole // gs, None if importance is None else importance[whole:])

    def _best_scale(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Scales of least error [rows, groups] for w [rows, groups, n]."""
        table = self._levels()
        if len(table) == 1:
            return self._search(w, table, importance)
        rows = chunk_rows(w)  # each chunk has the tables of its own rows
        chunks = zip(w.split(rows), table.split(rows), strict=True)
        return torch.cat([self._search(c, t, importance) for c, t in chunks])

    def _search(self, w: Tensor, table: Tensor, importance: Tensor | None) -> Tensor:
        low, high = table[:, :1], table[:, -1:]
        reach = [_covering(w, low, high)]
        if not torch.equal(table, -table.flip(-1)):
            reach.append(-_covering(-w, low, high))  # a negative scale turns the table round

        nearest = _NearestInCells(table)

        def level(u: Tensor, zero: Tensor) -> Tensor:
            return nearest(u)

        zero = torch.zeros_like(reach[0])
        starts = [(scale, zero) for scale in reach]
        return least_error_scale(w, level, starts, importance, ladder=(*STRETCH, *LADDER))[0]

    def _by_group(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], self.scale.shape[1])
        return out.index_add_(1, self.group, x)

    @staticmethod
    def _codes(u: Tensor, table: Tensor) -> Tensor:
        """Index of the nearest level, int64 as u [rows, ...]; midway between two it is the lower."""
        middle = (table[:, 1:] + table[:, :-1]) / 2
        if len(table) == 1:
            return torch.bucketize(u, middle[0])
        return torch.searchsorted(middle, u.flatten(1).contiguous()).view(u.shape)

    @staticmethod
    def _values(codes: Tensor, table: Tensor) -> Tensor:
        if len(table) == 1:
            return table[0][codes]
        return table.gather(-1, codes.flatten(1)).view(codes.shape)


class _NearestInCells:
    """The nearest level by a look-up in even cells, about: exact except in the cell that holds a boundary.

    For the search of scales alone, which asks some twenty times for every weight: 1.5 ns, a binary search 60.
    """

    def __init__(self, table: Tensor) -> None:
        self.cells = 4096 if len(table) == 1 else 1024
        self.low = table[:, :1, None]
        span = table[:, -1:, None] - self.low
        self.per_unit = torch.where(span > 0, self.cells / span, 0.0)
        centre = (torch.arange(self.cells, device=table.device) + 0.5) / self.cells * span[..., 0] + self.low[..., 0]
        middle = (table[:, 1:] + table[:, :-1]) / 2
        self.levels = table.gather(-1, torch.searchsorted(middle, centre)).flatten()
        self.first = (torch.arange(len(table), device=table.device, dtype=torch.int32) * self.cells)[:, None, None]

    def __call__(self, u: Tensor) -> Tensor:
        """u [rows, groups, n], overwritten -> levels."""
        cell = u.sub_(self.low).mul_(self.per_unit).clamp_(0, self.cells - 1).to(torch.int32)
        return self.levels.index_select(0, cell.add_(self.first).flatten()).view(u.shape)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _covering(w: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The smallest positive scale [rows, groups] whose outermost levels cover w [rows, groups, n]."""
    above, below = w.amax(-1).clamp(min=0), (-w.amin(-1)).clamp(min=0)
    none = torch.zeros_like(above)
    return torch.maximum(torch.where(high > 0, above / high, none), torch.where(low < 0, below / -low, none))


class LutCodec:
    name = "lut"
    scheme_class = LutScheme
    rows_together = 1

    def fields(self, scheme: LutScheme, shape: tuple[int, int]) -> Fields:
        out, n = shape
        table = (out, scheme.entries) if scheme.table_scope == "row" else (scheme.entries,)
        fields: Fields = {
            "codes": ((out * row_bytes(-(-n // scheme.dims), scheme.bits),), torch.uint8),
            "table": ((scheme.entries, 2) if scheme.dims == 2 else table, torch.float16),
        }
        if scheme.scaled:
            fields["scale"] = ((out, group_count(n, scheme.group_size)), torch.float16)
        return fields

    def grid(self, scheme: LutScheme, shape: tuple[int, int], device: torch.device) -> Grid:
        return PairGrid(scheme, shape, device) if scheme.dims == 2 else LutGrid(scheme, shape, device)

    def decode(self, qt: QuantizedTensor) -> Tensor:
        scheme = qt.scheme
        assert isinstance(scheme, LutScheme)
        out, n = qt.shape
        codes = unpack_bits(qt.fields["codes"].view(out, -1), -(-n // scheme.dims), scheme.bits).long()
        table = qt.fields["table"].float()
        if scheme.dims == 2:
            w = table[codes].view(out, -1)[:, :n]
        else:
            w = table.gather(-1, codes) if scheme.table_scope == "row" else table[codes]
        if not scheme.scaled:
            return w
        return w * qt.fields["scale"].float()[:, group_of_column(n, scheme.group_size, codes.device)]

    def tolerance(self, scheme: LutScheme) -> float:
        return 0.02


CODEC = LutCodec()
