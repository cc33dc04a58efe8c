"""Packed tiles: where each code stands, by loops over the layout's text; golden bytes, and the exact inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.tiles import pack_tiles, unpack_tiles, why_not_tiles
from bitpalette.quant.bitstream import pack_bits, unpack_bits
from bitpalette.quant.codec import get_codec, group_count
from bitpalette.quant.int_progressive import largest_group_scale
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.tensor import QuantizedTensor, field_specs
from bitpalette.quant.trellis import states

SHAPES = [(1, 1), (17, 123), (64, 64), (65, 130), (123, 577), (130, 1537), (576, 64)]
GROUPS = [0, 32, 64, 128, 192]
SCHEMES = [
    *(
        {"codec": "int", "bits": b, "group_size": g, "symmetric": s}
        for b in (2, 3, 4, 8)
        for g in GROUPS
        for s in (0, 1)
    ),
    *({"codec": "lut", "entries": e, "table": "kmeans", "group_size": g} for e in (4, 8, 16) for g in GROUPS),
    *({"codec": "int", "group_size": g, "symmetric": s, "progressive": True} for g in GROUPS[1:] for s in (0, 1)),
    *({"codec": "float", "element": e, "group_size": g} for e in ("e2m1", "e4m3") for g in GROUPS),
    *({"codec": "lut", "entries": e, "table": "kmeans"} for e in (5, 6, 7, 9, 11, 15)),
    *({"codec": "lut", "entries": e, "table": "kmeans", "scaled": False} for e in (4, 7, 16)),
    *(
        {"codec": "trellis", "rate": m / 16, "window": w}
        for m in (16, 17, 23, 40, 47, 48, 79, 80)
        for w in (12, 14, 16)
    ),
]


def scheme_of(values: dict) -> Scheme:
    return Scheme.from_dict({k: bool(v) if k == "symmetric" else v for k, v in values.items()})


def random_tensor(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Random codes, as the codec packs them, and random bits in every other field."""
    generator = torch.Generator().manual_seed(seed)
    out, n = shape
    fields = {}
    for name, (size, dtype) in field_specs(scheme, shape).items():
        if dtype == torch.float16:
            fields[name] = torch.randint(-32768, 32768, size, dtype=torch.int16, generator=generator).view(dtype)
        else:
            fields[name] = torch.randint(0, 256, size, dtype=dtype, generator=generator)
    if scheme.codec != "trellis":
        bits = scheme.bits  # type: ignore[attr-defined]
        size = out, -(-n // scheme.block)
        codes = torch.randint(0, getattr(scheme, "entries", 1 << bits), size, dtype=torch.uint8, generator=generator)
        fields["codes"] = pack_bits(codes, bits).flatten()
        if "zero_point" in fields:
            groups = group_count(n, scheme.group_size)  # type: ignore[attr-defined]
            zero = torch.randint(0, 1 << bits, (out, groups), dtype=torch.uint8, generator=generator)
            fields["zero_point"] = pack_bits(zero, bits)
        if "group_scale" in fields:
            zero = zero if "zero_point" in fields else torch.full((out, fields["group_scale"].shape[1]), 8)
            fields["group_scale"] = (fields["group_scale"] % largest_group_scale(zero.int()) + 1).to(torch.uint8)
    return QuantizedTensor(scheme, shape, fields)


def fits(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return getattr(scheme, "group_size", 0) <= shape[1]


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("values", SCHEMES, ids=str)
def test_the_inverse_is_exact(values: dict) -> None:
    scheme = scheme_of(values)
    for shape in (shape for shape in SHAPES if fits(scheme, shape)):
        assert why_not_tiles(scheme, shape) is None
        qt = random_tensor(scheme, shape)
        back = unpack_tiles(scheme, shape, pack_tiles(qt))
        assert back.scheme == scheme and back.shape == shape and back.fields.keys() == qt.fields.keys()
        for name in qt.fields:
            assert equal_bits(back.fields[name], qt.fields[name]), f"{shape} {name}"


# -- where a code stands: one weight at a time


def bytes_of(codes: Tensor) -> list[int]:
    return codes.view(torch.uint8).flatten().tolist()


def place(row: int, column: int, shape: tuple[int, int]) -> tuple[int, int, int, int, int, int]:
    """(superblock, n16, k16, lane, 1 for the lower row of the two, column of the lane's four)."""
    superblock = (row // 64) * (-(-shape[1] // 64)) + column // 64
    r, c = row % 64, column % 64
    lane = 4 * (r % 16 % 8) + c % 16 // 4
    return superblock, r // 16, c // 16, lane, r % 16 // 8, c % 4


NIBBLE_SLOTS = ["g c0", "g+8 c0", "g c2", "g+8 c2", "g c1", "g+8 c1", "g c3", "g+8 c3"]
PAIR_SLOTS = ["g c0", "g c1", "g+8 c0", "g+8 c1", "g c2", "g c3", "g+8 c2", "g+8 c3"]


def read_bits(data: list[int], bit: int, count: int) -> int:
    return sum((data[(bit + i) // 8] >> ((bit + i) % 8) & 1) << i for i in range(count))


def read_code(data: list[int], layout: str, row: int, column: int, shape: tuple[int, int]) -> int:
    superblock, n16, k16, lane, lower, j = place(row, column, shape)
    slots = PAIR_SLOTS if layout.startswith("pairs") else NIBBLE_SLOTS
    slot = slots.index(f"g{'+8' if lower else ''} c{j}")
    if layout == "bits4":
        return read_bits(data, 8 * superblock * 2048 + 32 * ((n16 * 32 + lane) * 4 + k16) + 4 * slot, 4)
    if layout in ("bits2", "pairs2"):
        word = 8 * superblock * 1024 + 32 * ((n16 * 32 + lane) * 2 + k16 // 2)
        return read_bits(data, word + 4 * slot + 2 * (k16 % 2), 2)
    if layout in ("bits3", "pairs3"):
        low = 8 * superblock * 1536 + 32 * ((n16 * 32 + lane) * 2 + k16 // 2)
        high = 8 * (superblock * 1536 + 1024) + 32 * (n16 * 32 + lane)
        return read_bits(data, low + 4 * slot + 2 * (k16 % 2), 2) | read_bits(data, high + 4 * slot + k16, 1) << 2
    if layout == "bits8":
        return data[superblock * 4096 + 8 * ((n16 * 32 + lane) * 4 + k16) + 4 * lower + [0, 2, 1, 3].index(j)]
    assert layout == "pairs4"
    register = lower + 2 * (j // 2)  # a0 (g; c0, c1), a1 (g+8; c0, c1), a2 (g; c2, c3), a3 (g+8; c2, c3)
    byte = superblock * 2048 + 4 * ((n16 * 32 + lane) * 4 + k16) + register
    return data[byte] >> 4 * (j % 2) & 15


LAYOUTS = [
    ({"codec": "int", "bits": 2}, "bits2", 2),
    ({"codec": "int", "bits": 3}, "bits3", 3),
    ({"codec": "int", "bits": 4}, "bits4", 4),
    ({"codec": "int", "bits": 8}, "bits8", 8),
    ({"codec": "lut", "entries": 4}, "pairs2", 2),
    ({"codec": "lut", "entries": 5, "table": "kmeans"}, "pairs3", 3),
    ({"codec": "lut", "entries": 8}, "pairs3", 3),
    ({"codec": "lut", "entries": 9, "table": "kmeans"}, "pairs4", 4),
    ({"codec": "lut"}, "pairs4", 4),
    ({"codec": "float"}, "pairs4", 4),
    ({"codec": "float", "element": "e4m3"}, "bits8", 8),
]


@pytest.mark.parametrize(("values", "layout", "bits"), LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (70, 150)], ids=str)
def test_where_every_code_stands(values: dict, layout: str, bits: int, shape: tuple[int, int]) -> None:
    qt = random_tensor(Scheme.from_dict(values), shape)
    codes = unpack_bits(qt.fields["codes"].view(shape[0], -1), shape[1], bits).tolist()
    packed = pack_tiles(qt)["codes"]
    blocks = -(-shape[0] // 64), -(-shape[1] // 64)
    assert packed.dtype == torch.int32 and packed.is_contiguous() and packed.shape == (*blocks, 128 * bits)
    data = bytes_of(packed)
    for row in range(blocks[0] * 64):
        for column in range(blocks[1] * 64):
            inside = row < shape[0] and column < shape[1]
            assert read_code(data, layout, row, column, shape) == (codes[row][column] if inside else 0), (row, column)


@pytest.mark.parametrize("m", [16, 23, 40, 47, 79, 80])
def test_where_a_trellis_window_stands(m: int) -> None:
    """The 32 bits that a lane reads for its four columns of a row hold the four windows that the codec sees."""
    scheme, shape = Scheme.from_dict({"codec": "trellis", "rate": m / 16}), (40, 90)
    qt = random_tensor(scheme, shape)
    tiles = qt.fields["codes"].view(3, 6, -1)
    expected = states(tiles.flatten(0, 1), m, 16).view(3, 6, 16, 16).tolist()
    packed = pack_tiles(qt)["codes"]
    w = (m + 1) // 2
    assert packed.shape == (1, 2, 16 * w)
    words = [x & 0xFFFFFFFF for x in packed.flatten().tolist()]
    for tile_row in range(3):
        for tile in range(6):
            first = (tile // 4) * 16 * w + (tile_row * 4 + tile % 4) * w  # n16, then k16
            string = words[first : first + w]
            for row in range(16):
                for t in range(4):
                    start = row * m + 4 * t * m // 16
                    at, shift = start // 32, start % 32
                    read = (string[at] | string[0 if at + 1 == w else at + 1] << 32) >> shift & 0xFFFFFFFF
                    for j in range(4):
                        by = (4 * t + j) * m // 16 - 4 * t * m // 16
                        assert by <= 15
                        assert read >> by & 0xFFFF == expected[tile_row][tile][row][4 * t + j], (
                            tile_row,
                            tile,
                            row,
                            t,
                            j,
                        )


@pytest.mark.parametrize(
    ("values", "fill", "code", "start"),
    [  # weight (1, 2) alone has the code: lane 4, first row, c2, tile 0 of superblock 0
        ({"codec": "int", "bits": 4}, 2048, 0xB, (64, "000b0000")),
        ({"codec": "int", "bits": 2}, 1024, 0x3, (32, "00030000")),
        ({"codec": "int", "bits": 8}, 4096, 0xA7, (128, "00a70000")),
        ({"codec": "lut"}, 2048, 0xB, (64, "00000b00")),
        ({"codec": "lut", "entries": 8}, 1536, 0x3, (32, "00000300")),
        ({"codec": "int", "bits": 3}, 1536, 0x4, (1024 + 16, "00010000")),
    ],
    ids=str,
)
def test_golden_bytes(values: dict, fill: int, code: int, start: tuple[int, str]) -> None:
    scheme = Scheme.from_dict(values)
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    codes[1, 2] = code
    qt = random_tensor(scheme, (2, 3))
    qt.fields["codes"] = pack_bits(codes, scheme.bits).flatten()  # type: ignore[attr-defined]
    data = bytes(bytes_of(pack_tiles(qt)["codes"]))
    expected = bytearray(fill)
    offset, hexadecimal = start
    # little-endian: byte 1 of a nibble word is slots 2 and 3, (g, c2) the lower
    expected[offset : offset + 4] = bytes.fromhex(hexadecimal)
    assert data == bytes(expected)


# -- parameters


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", [(1, 200), (70, 200), (64, 576)], ids=str)
def test_parameters_group_major(group_size: int, shape: tuple[int, int]) -> None:
    scheme = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": group_size, "symmetric": False})
    qt = random_tensor(scheme, shape)
    tensors = pack_tiles(qt)
    out, n = shape
    padded = -(-n // 64) * 64
    scale = qt.fields["scale"]
    zero = unpack_bits(qt.fields["zero_point"], scale.shape[1], 4)
    assert set(tensors) == {"codes", "scale", "zero_point"}
    for name, dtype, values in (("scale", torch.float16, scale), ("zero_point", torch.uint8, zero)):
        packed = tensors[name]
        groups = -(-padded // group_size) if group_size else 1
        assert packed.dtype == dtype and packed.is_contiguous() and packed.shape == (groups, -(-out // 64) * 64)
        for group in range(groups):
            for row in range(packed.shape[1]):
                inside = row < out and group < values.shape[1]
                expected = values[row, group] if inside else torch.zeros((), dtype=dtype)
                assert equal_bits(packed[group, row].reshape(1), expected.reshape(1)), (group, row)


def int8_of_word(word: int, group_scale: int, group_offset: int) -> list[int]:
    """As a kernel makes four levels: one multiplication and addition of 32 bits for the word, then XOR."""
    product = (word * group_scale + group_offset * 0x01010101) & 0xFFFFFFFF
    levels = [(product ^ 0x80808080) >> 8 * i & 0xFF for i in range(4)]
    return [level - 256 if level >= 128 else level for level in levels]


@pytest.mark.parametrize("symmetric", [True, False])
def test_progressive_levels_never_carry(symmetric: bool) -> None:
    """The hardest words: codes 0 and 15 side by side, at every zero point the largest group scale, and the smallest."""
    scheme = Scheme.from_dict({"codec": "int", "group_size": 32, "symmetric": symmetric, "progressive": True})
    zero = torch.arange(32, dtype=torch.uint8)[:, None] // 2 if not symmetric else torch.full((32, 1), 8)
    whole = torch.where(torch.arange(32)[:, None] % 2 == 0, largest_group_scale(zero.int()), 1).to(torch.uint8)
    qt = random_tensor(scheme, (32, 32))
    qt.fields["group_scale"] = whole
    if not symmetric:
        qt.fields["zero_point"] = zero.clone()
    tensors = pack_tiles(qt)
    assert set(tensors) == {"codes", "scale", "group_scale", "group_offset"}
    assert tensors["scale"].shape == (1, 64) and tensors["group_scale"].shape == tensors["group_offset"].shape == (
        2,
        64,
    )
    assert equal_bits(tensors["scale"][0, :32], qt.fields["scale"][:, 0].contiguous())
    for row in range(32):
        s, offset = int(tensors["group_scale"][0, row]), int(tensors["group_offset"][0, row])
        for codes in ((0, 15, 0, 15), (15, 0, 15, 0), (15, 15, 15, 15), (0, 0, 0, 0), (1, 14, 7, 8)):
            word = sum(code << 8 * i for i, code in enumerate(codes))
            assert int8_of_word(word, s, offset) == [(code - int(zero[row])) * s for code in codes], (row, codes)


@pytest.mark.parametrize(("whole", "zero"), [(15, 8), (8, 0), (8, 15), (12, 5), (0, 8), (255, 8)])
def test_progressive_scales_that_overflow_are_refused(whole: int, zero: int) -> None:
    scheme = Scheme.from_dict({"codec": "int", "group_size": 64, "symmetric": False, "progressive": True})
    qt = random_tensor(scheme, (5, 128))
    pack_tiles(qt)
    qt.fields["group_scale"][3, 1] = whole
    qt.fields["zero_point"][3] = 8 | zero << 4
    with pytest.raises(SchemeError, match=f"group_scale {whole} of row 3, group 1 does not fit the zero point {zero}"):
        pack_tiles(qt)


@pytest.mark.parametrize("entries", [4, 5, 8, 9, 16])
def test_table_is_padded(entries: int) -> None:
    qt = random_tensor(Scheme.from_dict({"codec": "lut", "entries": entries, "table": "kmeans"}), (3, 40))
    table = pack_tiles(qt)["table"]
    assert table.dtype == torch.float16 and table.shape == (16,)
    assert equal_bits(table[:entries], qt.fields["table"]) and table[entries:].tolist() == [0.0] * (16 - entries)


def test_the_table_of_e2m1() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = pack_tiles(random_tensor(Scheme.from_dict({"codec": "float"}), (3, 40)))["table"]
    assert table.dtype == torch.float16 and table.tolist() == positive + [-v for v in positive]
    assert "table" not in pack_tiles(random_tensor(Scheme.from_dict({"codec": "float", "element": "e4m3"}), (3, 40)))


def test_a_table_in_units_of_the_weights_has_scale_one() -> None:
    qt = random_tensor(Scheme.from_dict({"codec": "lut", "table": "kmeans", "scaled": False}), (70, 40))
    assert pack_tiles(qt)["scale"].tolist() == [[1.0] * 70 + [0.0] * 58]


def test_trellis_scale_of_padded_rows_is_zero() -> None:
    qt = random_tensor(Scheme.from_dict({"codec": "trellis"}), (70, 40))
    scale = pack_tiles(qt)["scale"]
    assert scale.shape == (1, 128) and equal_bits(scale[0, :70], qt.fields["scale"])
    assert scale[0, 70:].tolist() == [0.0] * 58


# -- what has no tiles


@pytest.mark.parametrize(
    ("values", "shape", "reason"),
    [
        ({"codec": "int", "bits": 5}, (16, 64), "not 5"),
        ({"codec": "int", "bits": 1}, (16, 64), "not 1"),
        ({"codec": "int", "per_input_channel": True}, (16, 64), "input channel"),
        ({"codec": "int", "group_size": 16}, (16, 64), "not 16"),
        ({"codec": "int", "group_size": 96}, (16, 192), "not 96"),
        ({"codec": "lut", "entries": 17, "table": "kmeans"}, (16, 64), "not 17"),
        ({"codec": "lut", "entries": 16, "dims": 2}, (16, 64), "not for 2"),
        ({"codec": "lut", "table": "kmeans", "table_scope": "row"}, (16, 64), "not one a row"),
        ({"codec": "lut", "group_size": 48}, (16, 64), "not 48"),
        ({"codec": "float", "element": "e2m3"}, (16, 64), "not e2m3"),
        ({"codec": "float", "scale_format": "e8m0", "group_size": 32}, (16, 64), "not e8m0"),
        ({"codec": "float", "scale_format": "e4m3", "group_size": 16}, (16, 64), "not e4m3"),
    ],
    ids=str,
)
def test_why_not(values: dict, shape: tuple[int, int], reason: str) -> None:
    scheme = Scheme.from_dict(values)
    assert reason in str(why_not_tiles(scheme, shape))
    with pytest.raises(SchemeError, match=reason):
        pack_tiles(random_tensor(scheme, shape))
    with pytest.raises(SchemeError, match=reason):
        unpack_tiles(scheme, shape, {})


def test_why_not_transforms_and_stacks() -> None:
    assert "transforms ['rotate']" in str(
        why_not_tiles(Scheme.from_dict({"codec": "int", "transforms": ["rotate"]}), (4, 8))
    )
    assert "[2, 4, 8]" in str(why_not_tiles(Scheme.from_dict({"codec": "int"}), (2, 4, 8)))


@pytest.mark.parametrize("values", [{"codec": "int", "bits": 3}, {"codec": "lut"}, {"codec": "trellis"}], ids=str)
def test_chunks_make_no_difference(values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme.from_dict(values)
    qt = random_tensor(scheme, (300, 100))
    whole = pack_tiles(qt)
    monkeypatch.setattr("bitpalette.kernels.tiles.CHUNK", 64 * 128 * 2)
    parts = pack_tiles(qt)
    assert all(equal_bits(whole[name], parts[name]) for name in whole)
    back = unpack_tiles(scheme, qt.shape, parts)  # type: ignore[arg-type]
    assert all(equal_bits(back.fields[name], qt.fields[name]) for name in qt.fields)
    decode: Callable[[QuantizedTensor], Tensor] = get_codec(scheme.codec).decode
    assert equal_bits(decode(back), decode(qt))
