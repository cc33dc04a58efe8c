"""csrc/cpu/kmeans.h: the optimum by trial of every split, awkward rows, threads, what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitpalette.quant import native
from bitpalette.quant.lloyd import kmeans_1d, optimal_kmeans_1d

pytestmark = pytest.mark.skipif(not native.available_isas(), reason="the CPU extension is not built")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Weighted squared error of every row, float64 [rows]."""
    nearest = (values.double()[..., None] - levels.double()[:, None]).square().amin(-1)
    return (weights.double() * nearest).sum(1)


def least_error(values: Tensor, weights: Tensor, entries: int) -> float:
    """Of one row [n], by trying every split of the sorted numbers."""
    order = values.argsort()
    v, w = values[order].double(), weights[order].double()
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(v)), entries - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(v))):
            mean = (v[a:b] * w[a:b]).sum() / w[a:b].sum()
            total += float((w[a:b] * (v[a:b] - mean).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("entries", [1, 2, 3, 4, 5])
def test_optimum_of_short_rows(entries: int) -> None:
    values, weights = normal(20, 9), torch.exp(2 * normal(20, 9, seed=1))
    found = error(values, weights, optimal_kmeans_1d(values, weights, entries))
    for row in range(20):
        assert abs(float(found[row]) / least_error(values[row], weights[row], entries) - 1) < 1e-4


@pytest.mark.parametrize("n", [17, 123, 577, 1537])
@pytest.mark.parametrize("entries", [4, 16, 256])
def test_never_above_lloyds_iteration(entries: int, n: int) -> None:
    values, weights = normal(12, n), torch.exp(2 * normal(12, n, seed=1))
    levels, local = optimal_kmeans_1d(values, weights, entries), kmeans_1d(values, weights, entries)
    assert levels.shape == (12, entries) and bool((levels.diff(dim=1) >= 0).all())
    ours, theirs = error(values, weights, levels), error(values, weights, local)
    assert bool((ours <= theirs * (1 + 1e-5) + 1e-9).all())
    if entries == 16 and n > 500:
        assert ours.sum() < 0.97 * theirs.sum()


def test_few_distinct_numbers_are_kept() -> None:
    centres = torch.tensor([-7.0, -1.0, 0.25, 2.0, 64.0])
    values = centres[torch.randint(0, 5, (3, 400), generator=torch.Generator().manual_seed(0))]
    levels = optimal_kmeans_1d(values, torch.rand(3, 400), 7)
    assert torch.equal(levels, torch.tensor([[-7.0, -1, 0.25, 2, 64, 64, 64]]).expand(3, 7))
    assert torch.equal(optimal_kmeans_1d(torch.zeros(2, 33), torch.ones(2, 33), 4), torch.zeros(2, 4))
    assert torch.equal(optimal_kmeans_1d(torch.tensor([[3.0]]), torch.ones(1, 1), 4), torch.full((1, 4), 3.0))


def test_numbers_of_no_weight_decide_nothing() -> None:
    values, weights = normal(6, 300), normal(6, 300, seed=1).abs()
    silent = weights.clone()
    silent[:, ::3] = 0
    kept = torch.arange(300) % 3 != 0
    levels = optimal_kmeans_1d(values, silent, 8)
    alone = error(values[:, kept], weights[:, kept], optimal_kmeans_1d(values[:, kept], weights[:, kept], 8))
    assert ((error(values, silent, levels) / alone) - 1).abs().max() < 1e-5
    # a row of no weight at all is fitted as if all weighed the same, and only ratios of weights count
    even = optimal_kmeans_1d(values, torch.ones(6, 300), 8)
    assert (optimal_kmeans_1d(values, torch.zeros(6, 300), 8) - even).abs().max() < 1e-6
    assert torch.equal(optimal_kmeans_1d(values, weights * 2.0**-100, 8), optimal_kmeans_1d(values, weights, 8))


def test_far_from_zero() -> None:
    """A mean of 1000 with a spread of 1: differences of sums keep their digits."""
    values, weights = normal(4, 577), normal(4, 577, seed=1).abs()
    near, far = optimal_kmeans_1d(values, weights, 16), optimal_kmeans_1d(values + 1000, weights, 16)
    rounded = (values + 1000) - 1000
    assert abs(float(error(rounded, weights, far - 1000).sum() / error(values, weights, near).sum()) - 1) < 1e-3


def test_a_row_depends_on_no_other_and_on_no_thread() -> None:
    values, weights = normal(37, 200), normal(37, 200, seed=1).square()
    values[::3] = (values[::3] * 8).round() / 8  # fewer distinct numbers, in memory that longer rows have used
    values[1::3] = (values[1::3] * 24).round() / 24
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(optimal_kmeans_1d(values, weights, 16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = [optimal_kmeans_1d(v, w, 16) for v, w in zip(values.split(1), weights.split(1), strict=True)]
    assert torch.equal(results[0], torch.cat(alone))


def test_strided_and_16_bit_rows() -> None:
    values, weights = normal(40, 8).T, normal(8, 40, seed=1).abs().bfloat16()
    expected = optimal_kmeans_1d(values.contiguous(), weights.float(), 5)
    assert torch.equal(optimal_kmeans_1d(values, weights, 5), expected)


def test_native_call_refuses_what_makes_no_sense() -> None:
    a = torch.zeros(64).data_ptr()
    for rows, n, entries in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        with pytest.raises(ValueError, match=rf"kmeans: {entries} levels for each row of \[{rows}, {n}\]"):
            native.cpu_module().kmeans_rows(a, a, rows, n, entries, a, 1)
