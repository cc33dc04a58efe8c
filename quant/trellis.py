"""Codec `trellis`: a trellis code of any rate from 1 to 5 bits in sixteenths, one scale a row.

Made for rotated weights, which are near N(0, 1) once a row's scale is taken out. Tiles of 16 x 16 weights are bit
strings that every weight reads through a window of its own:

    tile      rate/16 * 16 = 16 m bits = 2 m bytes (m = 16 * rate), bit j being bit j % 8 of byte j // 8, cyclic
    weight i  i = 16 * row + column of the tile: its window is the 16 bits from bit floor(i * m / 16) on
    state     the window's low L bits (L = `window`: 16, 14 or 12)
    level     the sum of the four bytes of (state * 0x83DCD12D mod 2^32), minus 510: nearly normal, deviation 147.8
    weight    level * (scale[row] / 128)

    m = 40 (2.5 bits), row 0 of a tile; weight c starts at bit floor(2.5 c) and shares 13 or 14 bits with the next:

      bit   0    2    5    7    10   12   15 ...          40 = row 1
            |<---- window of weight 0 (16 bits) ---->|
                 |<---- window of weight 1 ------------->|
                      |<---- window of weight 2 ------------->|

So neighbours differ by floor((i + 1) m / 16) - floor(i m / 16) bits: fractional rates are alternating shifts, at no
loss. The string being cyclic ("tail-biting") no bits are spent on where to start. The encoder is an exact search over
all 2^L states (Viterbi), walking from weight 255 down to 0: what a step adds are the low bits, which every byte of the
product depends on. The construction is that of QTIP (Tseng et al., arXiv 2406.11235) with the multiply-and-add-bytes
code of exllamav3; figures are in docs/trellis.md.

    codes  uint8 [ceil(out/16) * ceil(in/16) * 2 m]   tiles row by row; edges are padded inside the tiles
    scale  float16 [out]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .codec import Fields
from .native import chosen_isa, cpu_module, isa_index
from .scheme import Scheme, SchemeError
from .tensor import QuantizedTensor
from .trellis_cuda import encode_on_gpu, why_not_on_gpu

TILE = 16
MULTIPLIER = 0x83DCD12D
CENTRE = 510
UNIT = 128.0
"""Levels are stored weights times UNIT / scale: scales then have the size of the weights, well inside fp16."""

DEVIATION = 147.8
"""Of the levels: four bytes, each uniform in 0..255."""

WINDOWS = (12, 14, 16)

_CHUNK = 1 << 20
"""Weights decoded at a time: temporaries of a few MiB."""


@dataclass(frozen=True)
class TrellisScheme(Scheme):
    """rate: bits a weight, 1 to 5 in sixteenths. window: L, the bits a level depends on; fewer are faster to encode."""

    codec: ClassVar[str] = "trellis"
    rate: float = 4.0
    window: int = 16

    def validate(self) -> None:
        number = isinstance(self.rate, int | float) and not isinstance(self.rate, bool)
        if not (number and 1 <= self.rate <= 5 and self.rate * 16 == int(self.rate * 16)):
            raise SchemeError(f"rate is 1 to 5 bits in sixteenths, such as 2.5 or 3.0625; got {self.rate!r}")
        if isinstance(self.window, bool) or self.window not in WINDOWS:
            raise SchemeError(f"window is one of {list(WINDOWS)} bits; got {self.window!r}")
        object.__setattr__(self, "rate", float(self.rate))

    @property
    def block(self) -> int:
        return TILE

    @property
    def row_bits(self) -> int:
        """m: bits of 16 weights of a tile's row."""
        return int(self.rate * TILE)


def tile_count(shape: tuple[int, int]) -> tuple[int, int]:
    """(rows of tiles, tiles in a row) of a weight [out, in]."""
    return -(-shape[0] // TILE), -(-shape[1] // TILE)


@lru_cache(maxsize=8)
def levels(window: int) -> Tensor:
    """The level of every state, float32 [2^window] on the CPU."""
    with torch.inference_mode(False):
        product = (torch.arange(1 << window, dtype=torch.int64, device="cpu") * MULTIPLIER) & 0xFFFFFFFF
        total = sum((product >> (8 * k)) & 0xFF for k in range(4))
        return (total - CENTRE).float()  # type: ignore[union-attr]


def states(codes: Tensor, row_bits: int, window: int) -> Tensor:
    """int32 [tiles, 256]: the state of every weight, from tiles uint8 [tiles, 2 * row_bits]."""
    start = torch.arange(TILE * TILE, device=codes.device) * row_bits // TILE
    cyclic = torch.cat([codes, codes[:, :3]], 1).to(torch.int32)
    byte, shift = start // 8, (start % 8).to(torch.int32)
    word = cyclic[:, byte] | cyclic[:, byte + 1] << 8 | cyclic[:, byte + 2] << 16
    return (word >> shift) & ((1 << window) - 1)


def best_input_scale(scheme: TrellisScheme) -> float:
    """The deviation that the input should have, relative to that of the levels, for the least squared error."""
    rates, factors = zip(*SWEET[scheme.window].items(), strict=True)
    at = max(1, min(len(rates) - 1, sum(r < scheme.rate for r in rates)))
    part = (scheme.rate - rates[at - 1]) / (rates[at] - rates[at - 1])
    return factors[at - 1] + part * (factors[at] - factors[at - 1])


SWEET = {
    16: {1: 1.138, 1.5: 1.020, 2: 0.995, 2.5: 0.960, 3: 0.935, 3.5: 0.922, 4: 0.904, 4.5: 0.897, 5: 0.882},
    14: {
        1: 1.118,
        1.25: 1.063,
        1.5: 1.020,
        1.75: 0.995,
        2: 0.977,
        2.5: 0.946,
        3: 0.925,
        3.5: 0.909,
        4: 0.886,
        5: 0.858,
    },
    12: {
        1: 1.117,
        1.25: 1.047,
        1.5: 1.010,
        1.75: 0.985,
        2: 0.971,
        2.5: 0.938,
        3: 0.907,
        3.5: 0.892,
        4: 0.875,
        5: 0.834,
    },
}
"""Window to rate to (input deviation by level deviation) of the least error on N(0, 1): searched on 256 to 1024 tiles a
rate, linear in between."""


def encode(x: Tensor, row_bits: int, window: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [tiles, 2 m], levels float32 [tiles, 256]) nearest to x float32 [tiles, 256], in units of levels.

    The exact search of csrc/cpu/trellis_encode.h: the same for any number of threads and any instruction set.
    """
    x = x.contiguous()
    codes = torch.empty(x.shape[0], 2 * row_bits, dtype=torch.uint8, device="cpu")
    chosen = torch.empty_like(x)
    isa, threads = isa_index(chosen_isa()), torch.get_num_threads()
    addresses = codes.data_ptr(), chosen.data_ptr()
    cpu_module().trellis_encode(isa, x.data_ptr(), x.shape[0], row_bits, window, *addresses, threads)
    return codes, chosen


def encode_there(x: Tensor, row_bits: int, window: int) -> tuple[Tensor, Tensor]:
    """As `encode`, with results on x's device: searched on a GPU where that can be, else on the CPU, which is said once
    on stderr. The codes are the same."""
    if x.device.type == "cpu":
        return encode(x, row_bits, window)
    reason = why_not_on_gpu(x.device)
    if reason is None:
        return encode_on_gpu(x, row_bits, window)
    _say(reason)
    codes, chosen = encode(x.cpu(), row_bits, window)
    return codes.to(x.device), chosen.to(x.device)


@cache
def _say(reason: str) -> None:
    print(f"bitpalette: trellis codes are searched on the CPU: {reason}", file=sys.stderr)


class TrellisGrid:
    """One scale a row; a column block is 16 columns wide and all rows high."""

    group_size = 0
    rows_together = TILE

    def __init__(self, scheme: TrellisScheme, shape: tuple[int, int], device: torch.device) -> None:
        self.scheme, self.shape = scheme, shape
        self.scale = torch.zeros(shape[0], device=device)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        """A row's root mean square decides: rows of rotated weights are normal. `importance` does not matter then."""
        rms = w.square().mean(1).sqrt()
        scale = rms * (UNIT / (DEVIATION * best_input_scale(self.scheme)))
        if not float(scale.max()) <= 65504:
            raise SchemeError(f"weights of size {float(rms.max()):.3g} need a scale beyond fp16's 65504: keep them")
        self.scale = scale.to(torch.float16).float()

    def fit_group(self, w: Tensor, group: int, importance: Tensor | None = None) -> None:
        self.fit(w, importance)

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(codes uint8 [tile rows, tiles, 2 m], values float32 [out, n]) of w [out, n], whole tiles of columns."""
        (out, n), m = w.shape, self.scheme.row_bits
        tile_rows, tiles = tile_count((out, n))
        inverse = torch.where(self.scale == 0, 0.0, UNIT / self.scale)
        x = torch.zeros(tile_rows * TILE, tiles * TILE, device=w.device)
        torch.mul(w, inverse[:, None], out=x[:out, :n])
        x = x.view(tile_rows, TILE, tiles, TILE).transpose(1, 2).reshape(-1, TILE * TILE)
        codes, chosen = encode_there(x, m, self.scheme.window)
        codes, chosen = codes.view(tile_rows, tiles, 2 * m), chosen.view(tile_rows, tiles, TILE, TILE)
        values = chosen.transpose(1, 2).reshape(tile_rows * TILE, tiles * TILE)[:out, :n]
        return codes, values * (self.scale / UNIT)[:, None]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"codes": codes.flatten(), "scale": self.scale.to(torch.float16)}

    # -- coding single rows again (quant/ldlq.py)

    def part(self, rows: Tensor) -> TrellisGrid:
        part = TrellisGrid(self.scheme, (len(rows), self.shape[1]), rows.device)
        part.scale = self.scale[rows].clone()
        return part

    def widen(self, rows: Tensor, factor: float) -> None:
        self.scale[rows] = (self.scale[rows] * factor).clamp(max=65504).to(torch.float16).float()

    def replace(self, codes: Tensor, rows: Tensor, part: Any, part_codes: Tensor) -> None:
        codes[int(rows[0]) // TILE] = part_codes[0]
        self.scale[rows] = part.scale


class TrellisCodec:
    name = "trellis"
    scheme_class = TrellisScheme
    rows_together = TILE

    def fields(self, scheme: TrellisScheme, shape: tuple[int, int]) -> Fields:
        tile_rows, tiles = tile_count(shape)
        return {
            "codes": ((tile_rows * tiles * 2 * scheme.row_bits,), torch.uint8),
            "scale": ((shape[0],), torch.float16),
        }

    def grid(self, scheme: TrellisScheme, shape: tuple[int, int], device: torch.device) -> TrellisGrid:
        if device.type not in ("cpu", "cuda"):
            raise SchemeError(f"trellis codes are searched on a CPU or a CUDA GPU; move the weight from {device} first")
        return TrellisGrid(scheme, shape, device)

    def decode(self, qt: QuantizedTensor) -> Tensor:
        scheme = qt.scheme
        assert isinstance(scheme, TrellisScheme)
        out, n = qt.shape
        tile_rows, tiles = tile_count((out, n))
        codes = qt.fields["codes"].view(tile_rows, tiles, -1)
        table = levels(scheme.window).to(codes.device)
        w = torch.empty(out, n, device=codes.device)
        step = max(1, _CHUNK // (tiles * TILE * TILE))
        for first in range(0, tile_rows, step):
            part = codes[first : first + step]
            value = table[states(part.flatten(0, 1), scheme.row_bits, scheme.window)]
            value = value.view(len(part), tiles, TILE, TILE).transpose(1, 2).reshape(len(part) * TILE, tiles * TILE)
            rows = slice(first * TILE, min((first + step) * TILE, out))
            scale = qt.fields["scale"][rows].float() / UNIT
            torch.mul(value[: len(scale), :n], scale[:, None], out=w[rows])
        return w

    def tolerance(self, scheme: TrellisScheme) -> float:
        return 0.02


CODEC = TrellisCodec()
