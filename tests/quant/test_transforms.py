"""Every transform, alone and combined, leaves y = W x and the error measure tr(D H D^T) as they are."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitpalette.quant.int import IntScheme
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.scale import rounding_of, search_scale
from bitpalette.quant.scheme import SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.transform import get_transform, transform_names

CHAINS = [chain for n in (1, 2) for chain in itertools.permutations(transform_names(), n)]
SHAPES = [(1, 1), (17, 123), (64, 576), (5, 577)]


def make_stats(n: int, seed: int = 0, tokens: int = 256, dead: int = 0) -> tuple[torch.Tensor, Stats]:
    """Inputs whose columns differ in size by e^3, and their statistics; the first `dead` columns are always 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) * torch.exp(torch.randn(n, generator=generator) * 1.5)
    x[:, :dead] = 0
    return x, Stats(x.T @ x / tokens, x.abs().mean(0), tokens)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_preserved(chain: tuple[str, ...], shape: tuple[int, int], rng_weight) -> None:
    w0 = rng_weight(*shape)
    x0, stats0 = make_stats(shape[1])
    w, x, stats = w0, x0, stats0
    chosen = []
    for name in chain:
        transform = get_transform(name)
        fields = transform.choose(w, stats, 7, IntScheme(transforms=chain))
        again = transform.choose(w, stats, 7, IntScheme(transforms=chain))
        specs = transform.fields(shape)
        assert {k: (tuple(v.shape), v.dtype) for k, v in fields.items()} == specs
        assert all(torch.equal(fields[k], again[k]) for k in specs)
        w, x, stats = (
            transform.apply_weight(w, fields),
            transform.apply_input(x, fields),
            transform.apply_stats(stats, fields),
        )
        chosen.append((transform, fields))
    assert close(x @ w.T, x0 @ w0.T, 1e-4)
    assert close(stats.hessian, x.T @ x / len(x), 1e-4)
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert stats.tokens == stats0.tokens
    d = rng_weight(*shape, seed=1) * 0.01
    undone = w + d
    for transform, fields in reversed(chosen):
        undone = transform.undo_weight(undone, fields)
    error, error0 = output_error(w, w + d, stats), output_error(w0, undone, stats0)
    assert abs(error / error0 - 1) < 1e-3
    w1 = w
    for transform, fields in reversed(chosen):
        w1 = transform.undo_weight(w1, fields)
    assert close(w1, w0)


@pytest.mark.parametrize("name", transform_names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_keeps_its_dtype(name: str, dtype: torch.dtype, rng_weight) -> None:
    transform = get_transform(name)
    fields = transform.choose(rng_weight(8, 24), make_stats(24)[1], 0, IntScheme(transforms=(name,)))
    x = rng_weight(2, 3, 24).to(dtype)
    y = transform.apply_input(x, fields)
    assert y.dtype == dtype and y.shape == x.shape
    assert close(y.float(), transform.apply_input(x.float(), fields), 0.01)


def test_rotation_is_shared_by_layers_with_one_input(rng_weight) -> None:
    rotate = get_transform("rotate")
    a = rotate.choose(rng_weight(8, 96), None, 5, IntScheme())
    b = rotate.choose(rng_weight(32, 96, seed=1), make_stats(96)[1], 5, IntScheme(bits=2))
    assert torch.equal(a["signs"], b["signs"]) and torch.equal(a["signs"], random_signs(5, 96))


def test_absmean_after_rotation_is_about_right(rng_weight) -> None:
    rotate = get_transform("rotate")
    x, stats = make_stats(576, tokens=2048)
    fields = rotate.choose(rng_weight(1, 576), None, 0, IntScheme())
    measured = rotate.apply_input(x, fields).abs().mean(0)
    assert (rotate.apply_stats(stats, fields).absmean / measured - 1).abs().mean() < 0.1


def test_scale_search_lowers_the_output_error(rng_weight) -> None:
    w = rng_weight(96, 576)
    _, stats = make_stats(576)
    for scheme in ({"codec": "int", "bits": 3, "group_size": 64}, {"codec": "lut", "entries": 8, "group_size": 64}):
        plain = quantize_tensor(w, scheme, stats=stats)
        awq = quantize_tensor(w, scheme, solver="awq", stats=stats)
        rotated = quantize_tensor(w, {**scheme, "transforms": ["rotate"]}, solver="awq", stats=stats)
        error = [output_error(w, qt.dequantize(), stats) for qt in (plain, awq, rotated)]
        assert error[1] < 0.9 * error[0]
        assert error[2] < 0.9 * error[0]
        assert awq.scheme.transforms == ("scale",) and rotated.scheme.transforms == ("scale", "rotate")


def test_scale_is_normalised_and_dead_columns_are_left_alone(rng_weight) -> None:
    w = rng_weight(32, 128)
    _, stats = make_stats(128, dead=3)
    s = search_scale(w, stats, rounding_of(IntScheme(bits=3)))
    assert s.dtype == torch.float16 and bool((s > 0).all()) and bool(s.isfinite().all())
    assert torch.equal(s[:3], torch.ones(3, dtype=torch.float16))
    assert s.max() > 1.5
    assert abs(float(s[3:].max() * s[3:].min()) - 1) < 0.01


def test_scale_of_extreme_and_absent_inputs(rng_weight) -> None:
    w = rng_weight(8, 64)
    x = torch.ones(4, 64)
    x[:, 0], x[:, 1] = 1e18, 1e-18
    s = search_scale(w, Stats(x.T @ x / 4, x.abs().mean(0), 4), rounding_of(IntScheme(bits=3)))
    assert bool((s > 0).all()) and bool(s.isfinite().all())
    nothing = search_scale(w, Stats(torch.zeros(64, 64), torch.zeros(64), 4), rounding_of(IntScheme()))
    assert torch.equal(nothing, torch.ones(64, dtype=torch.float16))


def test_shared_scale_sums_the_errors(rng_weight) -> None:
    q, k = rng_weight(64, 128), rng_weight(16, 128, seed=1)
    _, stats = make_stats(128)
    seen = []

    def quantize(w: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        seen.append(w.shape[0])
        return rounding_of(IntScheme(bits=3))(w, energy)

    shared = search_scale([q, k], stats, quantize, steps=4)
    assert seen == [64, 16] * 5
    assert shared.shape == (128,)
    heavy = search_scale([q * 1e-3, k], stats, rounding_of(IntScheme(bits=3)))
    assert torch.equal(heavy, search_scale(k, stats, rounding_of(IntScheme(bits=3))))


def test_scale_needs_statistics(rng_weight) -> None:
    with pytest.raises(SchemeError, match="statistics"):
        get_transform("scale").choose(rng_weight(4, 8), None, 0, IntScheme())
    with pytest.raises(ValueError, match="statistics"):
        quantize_tensor(rng_weight(4, 8), IntScheme(), solver="awq")
