"""csrc/cpu/trellis_encode.h: the search against exact ones in float64, and the same result on every instruction set."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.quant.native import available_isas, cpu_module, isa_index
from bitpalette.quant.trellis import DEVIATION, WINDOWS, levels, states

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

FASTEST = available_isas()[-1] if available_isas() else ""


def normal_tiles(tiles: int, seed: int = 0, scale: float = 0.95) -> Tensor:
    return torch.randn(tiles, 256, generator=torch.Generator().manual_seed(seed)) * (scale * DEVIATION)


def encode(x: Tensor, m: int, window: int, isa: str = FASTEST, threads: int = 1) -> tuple[Tensor, Tensor, int]:
    """(codes, levels, tiles that needed the exact search); the levels are those that the codes stand for."""
    codes = torch.zeros(len(x), 2 * m, dtype=torch.uint8)
    chosen = torch.full_like(x, math.nan)
    exact = cpu_module().trellis_encode(
        isa_index(isa), x.data_ptr(), len(x), m, window, codes.data_ptr(), chosen.data_ptr(), threads
    )
    assert torch.equal(levels(window)[states(codes, m, window).long()], chosen)
    return codes, chosen, exact


class Reference:
    """Viterbi in float64 on the trellis of m and window, decisions stored, for one tile."""

    def __init__(self, m: int, window: int) -> None:
        self.window, self.level = window, levels(window).double().numpy()
        offset = [i * m // 16 for i in range(257)]
        self.bits = [offset[i + 1] - offset[i] for i in range(256)]
        self.forget = math.ceil(64 * window / m)  # weights after which a path is taken to have forgotten its beginning

    def run(self, x: np.ndarray, weights: list[int], start: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Costs of all states at the last weight; where each state of each weight came from. start: costs before."""
        costs, came = start, []
        for i in weights:
            k = self.bits[i]
            blocks = costs.reshape(1 << k, -1)  # states that differ in the bits that weight i does not see
            high = blocks.argmin(0)
            before = high * blocks.shape[1] + np.arange(blocks.shape[1])
            came.append(before.repeat(1 << k))
            costs = blocks.min(0).repeat(1 << k) + (x[i] - self.level) ** 2
        return costs, came

    def best(self, x: np.ndarray, seam: int) -> float:
        """The least squared error of all cyclic strings whose weight 0 is in the state `seam`."""
        start = np.full(1 << self.window, np.inf)
        start[seam] = 0
        return float(self.run(x, list(range(255, -1, -1)), start)[0][seam])

    def encode(self, x: np.ndarray) -> float:
        """Squared error of a tile: the seam's state by twice the windows that the encoder takes, then exact."""
        lead = list(range(4 * self.forget - 1, -1, -1))
        after = list(range(255, 255 - 4 * self.forget, -1))
        lead, after = [i % 256 for i in lead], [i % 256 for i in after]
        costs, came = self.run(x, lead + after, np.zeros(1 << self.window))
        state = int(costs.argmin())
        for row in reversed(came[len(lead) :]):
            state = int(row[state])
        return self.best(x, state)


@pytest.mark.parametrize(
    ("m", "window"),
    [*((m, 12) for m in (16, 23, 32, 40, 48, 57, 64, 80)), (19, 14), (40, 14), (64, 14), (32, 16), (45, 16)],
)
def test_no_better_string_with_the_same_seam(m: int, window: int) -> None:
    """Between its ends the search is exact but for rounding: .03 dB is the whole allowance, at 5 bits most of it."""
    x = normal_tiles({12: 6, 14: 3, 16: 2}[window], seed=m)
    codes, chosen, _ = encode(x, m, window)
    seam = states(codes, m, window)[:, 0].tolist()
    reference = Reference(m, window)
    best = sum(reference.best(tile.double().numpy(), s) for tile, s in zip(x, seam, strict=True))
    error = float((x.double() - chosen.double()).square().sum())
    assert 1 - 1e-12 < error / best < 10 ** (0.015 / 10)


@pytest.mark.parametrize("m", [24, 32, 48, 64])
def test_distortion_of_a_long_float_search(m: int) -> None:
    """Within .03 dB of a float64 encoder that sees far more of both sides before it settles the seam's state."""
    x = normal_tiles(48, seed=m)
    _, chosen, _ = encode(x, m, 12)
    reference = Reference(m, 12)
    best = sum(reference.encode(tile.double().numpy()) for tile in x)
    error = float((x.double() - chosen.double()).square().sum())
    assert error / best < 10 ** (0.03 / 10)


@pytest.mark.parametrize("window", WINDOWS)
def test_instruction_sets_agree(window: int) -> None:
    """Every rate at 12 bits; at 14 and 16 those that differ in how rows are kept, and odd ones."""
    rates = {12: range(16, 81), 14: (17, 32, 40, 57), 16: (24, 34, 49, 75)}[window]
    for m in rates:
        x = normal_tiles(3 if window == 12 else 2, seed=m)  # a pair at least
        first = encode(x, m, window, available_isas()[0])
        for isa in available_isas()[1:]:
            other = encode(x, m, window, isa)
            assert torch.equal(other[0], first[0]) and other[2] == first[2], f"m={m} {isa}"


def test_threads_and_neighbours_do_not_matter() -> None:
    x = normal_tiles(23, seed=1)
    codes, _, _ = encode(x, 37, 12)
    for threads in (2, 3, 64):
        assert torch.equal(encode(x, 37, 12, threads=threads)[0], codes)
    backwards, _, _ = encode(x.flip(0).contiguous(), 37, 12)
    assert torch.equal(backwards.flip(0), codes)
    encode(normal_tiles(2), 64, 14)  # another code in between, on the same thread
    again, _, _ = encode(x[5:6].contiguous(), 37, 12)
    assert torch.equal(again, codes[5:6])
    without = torch.zeros_like(codes)
    cpu_module().trellis_encode(isa_index(FASTEST), x.data_ptr(), len(x), 37, 12, without.data_ptr(), 0, 1)
    assert torch.equal(without, codes)


@pytest.mark.parametrize(
    ("m", "window", "tiles"), [(16, 12, 67), (24, 12, 67), (53, 12, 67), (20, 14, 23), (16, 16, 7)]
)
def test_a_tile_alone_and_with_others(m: int, window: int, tiles: int) -> None:
    """Tiles are searched in pairs, and those of a block of 64 that need a second pass are put in pairs as well."""
    x = normal_tiles(tiles, seed=m, scale=1.1)
    x[1] = x[1].sign() * 1e30  # left to the exact search, beside one that is not
    clips = m >= 52  # where levels are in sixty-fourths; coarser ones leave room
    codes, _, exact = encode(x, m, window)
    assert exact == clips
    for k in range(tiles):
        alone, _, exact = encode(x[k : k + 1].contiguous(), m, window)
        assert torch.equal(alone, codes[k : k + 1]) and exact == (clips and k == 1), f"tile {k}"


@pytest.mark.parametrize("isa", available_isas())
def test_golden_codes(isa: str) -> None:
    """The codes of a fixed input, by their hash: what files hold does not change unnoticed."""
    x = ((torch.arange(4 * 256) * 7919 % 1021) - 510).float().view(4, 256) / 2
    digest = hashlib.sha256()
    for m in (16, 29, 40, 64, 80):
        digest.update(encode(x, m, 12, isa)[0].numpy().tobytes())
    assert digest.hexdigest()[:16] == "b26635313e59ed99"


@pytest.mark.parametrize("isa", available_isas())
def test_costs_that_16_bits_do_not_hold(isa: str) -> None:
    """Tiles far outside the code's range: the exact search takes over, says so, and finds the best string."""
    x = normal_tiles(4, seed=5)
    x[0] = 1e30
    x[1] = x[1].sign() * 1e30
    x[2, :128] = 700.0
    x[3, 100:140] = x[3, 100:140].sign() * 1e30  # nothing at the seam
    codes, chosen, exact = encode(x, 64, 12, isa)
    assert exact == 4
    range_end = 512 - 1 / 64  # inputs end where levels end
    clipped = x.clamp(-range_end, range_end).double()
    seam = states(codes, 64, 12)[:, 0].tolist()
    reference = Reference(64, 12)
    for tile, found, s in zip(clipped, chosen, seam, strict=True):
        best = reference.best(tile.numpy(), s)
        assert float((tile - found.double()).square().sum()) == pytest.approx(best, rel=1e-9)


def test_paths_that_do_not_fall_in_with_the_best_one() -> None:
    """At 1 bit a few tiles in a hundred need the second, constrained pass; they are as good as the others."""
    x = normal_tiles(90, seed=9, scale=1.1)
    codes, chosen, exact = encode(x, 16, 12)
    assert exact == 0
    seam = states(codes, 16, 12)[:, 0].tolist()
    reference = Reference(16, 12)
    for tile, found, s in zip(x, chosen, seam, strict=True):
        error = float((tile.double() - found.double()).square().sum())
        assert error < reference.best(tile.double().numpy(), s) * 1.002


@pytest.mark.parametrize("window", WINDOWS)
def test_zeros_and_no_tiles(window: int) -> None:
    _, chosen, exact = encode(torch.zeros(2, 256), 32, window)
    assert exact == 0
    assert float(chosen.square().mean()) < 0.2 * DEVIATION**2
    assert torch.equal(chosen[0], chosen[1])
    encode(torch.zeros(0, 256), 32, window)


def test_what_makes_no_sense() -> None:
    cpu, x = cpu_module(), torch.zeros(1, 256)
    a = x.data_ptr()
    for m in (15, 81, 0, -16):
        with pytest.raises(ValueError, match=f"{m} bits for 16 weights, not 16 to 80"):
            cpu.trellis_encode(0, a, 1, m, 12, a, 0, 1)
    for window in (11, 13, 17, 0):
        with pytest.raises(ValueError, match=f"window of {window} bits, not 12, 14 or 16"):
            cpu.trellis_encode(0, a, 1, 32, window, a, 0, 1)
    with pytest.raises(ValueError, match="-1 tiles"):
        cpu.trellis_encode(0, a, -1, 32, 12, a, 0, 1)
    with pytest.raises(ValueError, match="no instruction set 9"):
        cpu.trellis_encode(9, a, 1, 32, 12, a, 0, 1)
