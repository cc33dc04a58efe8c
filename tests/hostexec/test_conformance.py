"""The twins of the instructions against other sources: CuTe's published strides, numpy, torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.hostexec

MINI = Path(__file__).with_name("mini.cu")
MEMBERS = re.search(r"enum class Word \{([^}]*)\}", MINI.read_text())
assert MEMBERS is not None
WORDS = [name.strip() for name in MEMBERS[1].split(",")]
U32 = np.uint32


def u32(*values: int) -> np.ndarray:
    return np.array(values, U32)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.fixture(scope="module")
def mini(hostexec: Any) -> Any:
    return hostexec.build([MINI])


def words(hostexec: Any, mini: Any, op: str, a: np.ndarray, b: Any = None, c: Any = None) -> np.ndarray:
    """One word-wise instruction on arrays of uint32 -> uint32."""
    zeros = np.zeros_like(a)
    out = hostexec.guarded(zeros)
    given = [hostexec.guarded(np.ascontiguousarray(x, dtype=U32)) for x in (a, zeros if b is None else b)]
    third = hostexec.guarded(zeros if c is None else np.ascontiguousarray(c, dtype=U32))
    mini.call("run_words", WORDS.index(op), a.size, *given, third, out)
    return out.array.copy()


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=U32)


# --- mma. CuTe's MMA_Traits of SM80 (include/cute/atom/mma_traits_sm80.hpp): for each lane and value the index of the
# element in a column-major matrix, as (shape, stride) of lane and of value, the first of a shape the fastest.

LAYOUTS: Any = {
    "16": {
        "A": (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128))),  # 16 x 16, m + 16 k
        "B": (((4, 8), (16, 1)), ((2, 2), (8, 64))),  # 8 x 16, n + 8 k
    },
    "8": {
        "A": (((4, 8), (64, 1)), ((4, 2, 2), (16, 8, 256))),  # 16 x 32
        "B": (((4, 8), (32, 1)), ((4, 2), (8, 128))),  # 8 x 32
    },
    "C": (((4, 8), (32, 1)), ((2, 2), (16, 8))),  # 16 x 8, m + 16 n
}


def indices(layout: Any) -> np.ndarray:
    """[32 lanes, values] -> index of the element."""

    def offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
        found = np.zeros(1, int)
        for size, step in zip(shape, stride, strict=True):
            found = (np.arange(size)[:, None] * step + found[None, :]).reshape(-1)
        return found

    lane, value = layout
    return offsets(*lane)[:, None] + offsets(*value)[None, :]


def fragments(matrices: np.ndarray, layout: Any) -> np.ndarray:
    """[count, rows, columns] -> [count, 32, registers] of uint32."""
    column_major = matrices.transpose(0, 2, 1).reshape(len(matrices), -1)
    return np.ascontiguousarray(column_major[:, indices(layout)]).view(U32)


def from_fragments(registers: np.ndarray, dtype: Any) -> np.ndarray:
    flat = np.empty((len(registers), 128), dtype)
    flat[:, indices(LAYOUTS["C"])] = registers.view(dtype)
    return flat.reshape(-1, 8, 16).transpose(0, 2, 1)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.uint16).numpy()


def one_hot_cases(rows: int, columns: int, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = rows * columns
    hot = np.zeros((count, count), dense.dtype)
    np.fill_diagonal(hot, 1)
    return hot.reshape(count, rows, columns), np.broadcast_to(dense, (count, *dense.shape))


@pytest.mark.parametrize("kind", ["f16", "bf16", "s8"])
def test_mma_fragments_are_those_of_cute(hostexec: Any, mini: Any, kind: str) -> None:
    depth = 32 if kind == "s8" else 16
    layout = LAYOUTS["8" if kind == "s8" else "16"]
    # every element of A in turn with a B of all different rows and columns, and the other way round
    size = 127 if kind == "s8" else 128
    dense_b = (np.arange(depth * 8).reshape(depth, 8) % size + 1).astype(np.int64)
    dense_a = (np.arange(16 * depth).reshape(16, depth) % size + 1).astype(np.int64)
    hot_a, with_b = one_hot_cases(16, depth, dense_b)
    hot_b, with_a = one_hot_cases(depth, 8, dense_a)
    a, b = np.concatenate([hot_a, with_a]), np.concatenate([with_b, hot_b])
    c = np.random.default_rng(1).integers(-50, 50, (len(a), 16, 8))
    expected = a @ b + c

    result: Any = np.int32 if kind == "s8" else np.float32
    if kind == "s8":
        small = [x.astype(np.int8) for x in (a, b)]
    else:
        encode = bf16_bits if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
        small = [encode(x) for x in (a, b)]
    c_registers = fragments(c.astype(result), LAYOUTS["C"])
    a_registers = fragments(small[0], layout["A"])
    b_registers = fragments(small[1].transpose(0, 2, 1), layout["B"])
    assert a_registers.shape[1:] == (32, 4) and b_registers.shape[1:] == (32, 2)
    d = hostexec.guarded(np.full((len(a), 32, 4), 0xFFFFFFFF, U32))
    number = ["f16", "bf16", "s8"].index(kind)
    given = [hostexec.guarded(x) for x in (a_registers, b_registers, c_registers)]
    mini.call("run_mmas", number, len(a), *given, d)
    np.testing.assert_array_equal(from_fragments(d.array, result), expected)


def test_mma_s8_wraps_around(hostexec: Any, mini: Any) -> None:
    a = np.full((32, 4), 0x80808080, U32)  # -128
    d = hostexec.guarded(np.zeros((32, 4), U32))
    c = np.full((32, 4), 2**31 - 1, U32)
    mini.call("run_mma", 2, hostexec.guarded(a), hostexec.guarded(a[:, :2]), hostexec.guarded(c), d)
    assert (d.array.view(np.int32) == -(2**31) - 1 + 32 * 128 * 128).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_special_values(hostexec: Any, mini: Any, kind: str) -> None:
    """Denormal operands count, an infinity and a NaN come out in their row only."""
    values = np.zeros((1, 16, 16), np.float32)
    values[0, 0, 0], values[0, 1, 0], values[0, 2, 0] = 2.0**-24 if kind == "f16" else 2.0**-130, np.inf, np.nan
    ones = np.ones((1, 8, 16), np.float32)
    encode = bf16_bits if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
    a, b = fragments(encode(values), LAYOUTS["16"]["A"]), fragments(encode(ones), LAYOUTS["16"]["B"])
    d = hostexec.guarded(np.zeros((1, 32, 4), U32))
    c = hostexec.guarded(np.zeros((1, 32, 4), U32))
    mini.call("run_mma", ["f16", "bf16"].index(kind), hostexec.guarded(a), hostexec.guarded(b), c, d)
    out = from_fragments(d.array, np.float32)[0]
    np.testing.assert_array_equal(out[:4], f32(values[0, 0, 0], np.inf, np.nan, 0)[:, None] * np.ones(8))


def test_ldmatrix(hostexec: Any, mini: Any) -> None:
    """Lane 8 i + j gives row j of matrix i; lane 4 g + t gets columns 2 t, 2 t + 1 of row g of each."""
    rng = np.random.default_rng(2)
    data = rng.integers(0, 2**16, 1024, dtype=np.uint16)
    offsets = rng.permutation(128)[:32].astype(np.int32) * 16
    out = hostexec.guarded(np.zeros((32, 4), U32))
    mini.call("run_ldmatrix", hostexec.guarded(data.view(np.uint8)), 2048, hostexec.guarded(offsets), out)
    rows = data.reshape(128, 8)[offsets // 16].reshape(4, 8, 8)  # matrix, row, column
    expected = rows.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4, 2)
    np.testing.assert_array_equal(out.array.view(np.uint16).reshape(32, 4, 2), expected)


# --- words


def test_prmt(hostexec: Any, mini: Any) -> None:
    a, b, selector = random_words(4000), random_words(4000, 1), random_words(4000, 2)
    pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], axis=1)
    nibbles = (selector[:, None] >> (4 * np.arange(4, dtype=U32))) & 15
    taken = np.take_along_axis(pool, (nibbles & 7).astype(int), axis=1)
    expected = np.where(nibbles & 8, (taken >> 7) * 255, taken).astype(np.uint8).view(U32)[:, 0]
    np.testing.assert_array_equal(words(hostexec, mini, "prmt", a, b, selector), expected)


def test_lop3_truth_tables(hostexec: Any, mini: Any) -> None:
    """The immediate is the function of 0xf0, 0xcc, 0xaa, for all 256 of them and on random words bit by bit."""
    a = np.concatenate([u32(0xF0), random_words(40)])
    b = np.concatenate([u32(0xCC), random_words(40, 1)])
    c = np.concatenate([u32(0xAA), random_words(40, 2)])
    out = hostexec.guarded(np.zeros((256, a.size), U32))
    mini.call("run_lop3", a.size, *(hostexec.guarded(x) for x in (a, b, c)), out)
    np.testing.assert_array_equal(out.array[:, 0] & 255, np.arange(256))
    bits = np.arange(32, dtype=U32)
    row = 4 * (a[:, None] >> bits & 1) + 2 * (b[:, None] >> bits & 1) + (c[:, None] >> bits & 1)
    expected = ((np.arange(256, dtype=U32)[:, None, None] >> row & 1) << bits).sum(-1, dtype=np.uint64)
    np.testing.assert_array_equal(out.array, expected)


def test_integer_words(hostexec: Any, mini: Any) -> None:
    a, b, c = random_words(3000), random_words(3000, 1), random_words(3000, 2)
    c[:64] = np.arange(64)
    a[:3] = 0, 1, 2**32 - 1
    wide = b.astype(np.uint64) << np.uint64(32) | a
    np.testing.assert_array_equal(
        words(hostexec, mini, "funnel_right", a, b, c), (wide >> (c & 31).astype(np.uint64)).astype(U32)
    )
    np.testing.assert_array_equal(words(hostexec, mini, "clz", a), [32 - int(x).bit_length() for x in a])
    np.testing.assert_array_equal(words(hostexec, mini, "popc", a), [int(x).bit_count() for x in a])
    high = a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)
    np.testing.assert_array_equal(words(hostexec, mini, "mul_hi", a, b), high.astype(U32))
    for op, left, right in (("uu", np.uint8, np.uint8), ("us", np.uint8, np.int8), ("ss", np.int8, np.int8)):
        products = a.view(left).astype(np.int64) * b.view(right).astype(np.int64)
        expected = (products.reshape(-1, 4).sum(1) + c.astype(np.int64)) % 2**32
        np.testing.assert_array_equal(words(hostexec, mini, f"dp4a_{op}", a, b, c), expected.astype(U32))


# --- floating point: rounded once. Awkward values: denormal, halfway, next to the largest.


def awkward_halves(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, count, dtype=np.uint16)
    near_one = (0x3C00 + rng.integers(-40, 40, count)).astype(np.uint16)
    denormal = rng.integers(0, 0x480, count, dtype=np.uint16)
    special = np.array([0, 0x8000, 1, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], np.uint16)
    pick = rng.integers(0, 4, count)
    return np.choose(pick, [bits, near_one, denormal, rng.choice(special, count)]).astype(np.uint16)


def rounded(exact: Any, mantissa: int, least: int, largest: float) -> float:
    """A Fraction to nearest even with that many mantissa bits and least exponent; slow and obvious."""
    from fractions import Fraction

    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, least) - mantissa)
    value = round(size / step) * step  # Fraction rounds half to even
    result = float(value) if value <= Fraction(largest) else np.inf
    return result if exact > 0 else -result


FORMATS = {"f16x2": (10, -14, 65504.0), "bf16x2": (7, -126, float(torch.finfo(torch.bfloat16).max))}


def values_of(bits: np.ndarray, form: str) -> np.ndarray:
    if form == "f16x2":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (bits.astype(U32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_pairs_are_rounded_once(hostexec: Any, mini: Any, op: str, form: str) -> None:
    from fractions import Fraction

    count = 3000
    halves = [awkward_halves(2 * count, seed) for seed in range(3)]
    if form == "bf16x2":  # the same spread around bfloat16's one and its denormal numbers
        halves = [np.where(h < 0x480, h >> 3, np.where(h & 0xFF80 == 0x3C00, h - 0x3C00 + 0x3F80, h)) for h in halves]
        # a product halfway between two numbers and an addend far below it that decides: what one rounding in a double
        # loses
        halves[0][:4], halves[1][:4], halves[2][:4] = 0x3F81, 0x3F84, [0x0080, 0x8080, 0x2000, 0xA000]
        halves[0][4:6], halves[1][4:6], halves[2][4:6] = 0x3FC0, 0x3F83, [0x0001, 0x8001]
    a, b, c = (h.astype(np.uint16) for h in halves)
    out = words(hostexec, mini, f"{op}_{form}", *(x.view(U32) for x in (a, b, c))).view(np.uint16)
    x, y, z = (values_of(v, form) for v in (a, b, c))
    got = values_of(out, form)
    with np.errstate(all="ignore"):
        plain = {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z}[op]
    finite = np.isfinite(x) & np.isfinite(y) & (np.isfinite(z) | (op != "fma"))
    assert finite.sum() > count
    np.testing.assert_array_equal(np.isnan(got[~finite]), np.isnan(plain[~finite]))
    for i in np.flatnonzero(finite):
        fx, fy = Fraction(x[i]), Fraction(y[i])
        exact = {"add": fx + fy, "sub": fx - fy, "mul": fx * fy}.get(op)
        exact = fx * fy + Fraction(z[i]) if exact is None else exact
        expected = rounded(exact, *FORMATS[form])
        assert got[i] == expected, (op, form, x[i], y[i], z[i], got[i], expected)
    zero = finite & (plain == 0)  # the sign of a zero is that of IEEE
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(plain[zero]))


def test_fp16_pairs_are_numpys(hostexec: Any, mini: Any) -> None:
    a, b = awkward_halves(20000, 5), awkward_halves(20000, 6)
    with np.errstate(all="ignore"):
        expected = {
            "add": a.view(np.float16) + b.view(np.float16),
            "sub": a.view(np.float16) - b.view(np.float16),
            "mul": a.view(np.float16) * b.view(np.float16),
        }
    for op, want in expected.items():
        got = words(hostexec, mini, f"{op}_f16x2", a.view(U32), b.view(U32)).view(np.float16)
        np.testing.assert_array_equal(got, want)


def test_conversions(hostexec: Any, mini: Any) -> None:
    x = np.concatenate([random_words(20000).view(np.float32), f32(0, -0.0, 65520, 65519.996, 2**-25, 2**-24)])
    x = np.concatenate([x, np.random.default_rng(3).standard_normal(20000).astype(np.float32) * 1000])
    y = x[::-1].copy()
    with np.errstate(all="ignore"):
        half = x.astype(np.float16)
    bfloat = torch.from_numpy(x).bfloat16()
    got = words(hostexec, mini, "float_to_f16", x.view(U32))
    np.testing.assert_array_equal(got.astype(np.uint16).view(np.float16), half)
    got = words(hostexec, mini, "float_to_bf16", x.view(U32))
    got_bfloat = torch.from_numpy(got.astype(np.uint16)).view(torch.bfloat16)
    torch.testing.assert_close(got_bfloat, bfloat, rtol=0, atol=0, equal_nan=True)
    for form, one in (("f16", np.float16), ("bf16", np.uint16)):
        both = words(hostexec, mini, f"pack_{form}x2", x.view(U32), y.view(U32))
        separate = words(hostexec, mini, f"float_to_{form}", x.view(U32)).astype(np.uint16)
        np.testing.assert_array_equal((both & 0xFFFF).astype(np.uint16).view(one), separate.view(one))
        np.testing.assert_array_equal((both >> 16).astype(np.uint16).view(one), separate[::-1].view(one))
    every = np.arange(2**16, dtype=U32)
    got = words(hostexec, mini, "f16_to_float", every).view(np.float32)
    np.testing.assert_array_equal(got, every.astype(np.uint16).view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(words(hostexec, mini, "bf16_to_float", every), every << 16)


def test_integers_of_floats(hostexec: Any, mini: Any) -> None:
    x = f32(0.5, 1.5, 2.5, -0.5, -1.5, 127.49999, 3e9, -3e9, np.inf, -np.inf, np.nan, 2147483520, 8388609.5)
    expected = [0, 2, 2, 0, -2, 127, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2147483520, 8388610]
    np.testing.assert_array_equal(words(hostexec, mini, "float_to_int", x.view(U32)).view(np.int32), expected)
    i = random_words(2000).view(np.int32)
    got = words(hostexec, mini, "int_to_float", i.view(U32)).view(np.float32)
    np.testing.assert_array_equal(got, i.astype(np.float32))


def test_approximations(hostexec: Any, mini: Any) -> None:
    x = f32(1, 2, 0.3, 17.5, 1e-39, 0, 3e-30, 1e30)
    flushed = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64)
    with np.errstate(all="ignore"):
        expected = {"rcp_approx": 1 / flushed, "rsqrt_approx": 1 / np.sqrt(flushed), "exp2_approx": np.exp2(flushed)}
    for op, want in expected.items():
        got = words(hostexec, mini, op, x.view(U32)).view(np.float32)
        np.testing.assert_allclose(got, want.astype(np.float32), rtol=3e-7)


@pytest.mark.parametrize("operand", [0, 1, 5, 16, 31])
def test_lanes(hostexec: Any, mini: Any, operand: int) -> None:
    value = random_words(32, operand)
    out = hostexec.guarded(np.zeros((7, 32), U32))
    lane = np.arange(32)
    expected = [
        np.full(32, value[operand]),
        value[np.where(lane + operand < 32, lane + operand, lane)],
        value[lane ^ operand],
        np.full(32, (value & 1) @ (1 << lane.astype(np.uint64))),
        np.full(32, value.astype(np.int64).sum() % 2**32),
        np.full(32, value.max()),
        np.full(32, value.min()),
    ]
    for options in hostexec.all_options():
        out.array[...] = 0
        mini.call("run_lanes", hostexec.guarded(value), operand, out, options=options)
        np.testing.assert_array_equal(out.array, np.asarray(expected, dtype=U32))
