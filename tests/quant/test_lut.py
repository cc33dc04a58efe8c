"""Codec `lut`: the tables against published values and theory, layout, golden bytes, k-means."""

from __future__ import annotations

import math

import pytest
import torch

from bitpalette.quant.codec import get_codec
from bitpalette.quant.lloyd import kmeans_1d, lloyd_max
from bitpalette.quant.lut import LutScheme, nf4
from bitpalette.quant.scheme import SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.tensor import field_specs, stack, stored_bytes, unstack

SHAPES = [(1, 1), (17, 123), (64, 576), (8, 1536), (5, 577)]
KINDS = [
    {"table": "nf4"},
    {"table": "nf4", "group_size": 64},
    {"table": "lloyd", "entries": 4, "group_size": 64},
    {"table": "lloyd", "entries": 5},
    {"table": "kmeans"},
    {"table": "kmeans", "entries": 255, "group_size": 64},
    {"table": "kmeans", "entries": 17, "scaled": False},
    {"table": "kmeans", "entries": 8, "table_scope": "row", "scaled": False},
    {"table": "kmeans", "entries": 8, "table_scope": "row", "group_size": 64},
    {"table": "values", "entries": 6, "values": [-4, -2, -1, 0.5, 1, 2]},
    {"table": "values", "entries": 9, "values": [-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3], "scaled": False},
]


def mse(w: torch.Tensor, q: torch.Tensor) -> float:
    return float((w - q).square().mean())


def test_nf4_is_as_published() -> None:
    levels = nf4()
    assert len(levels) == 16 and levels == tuple(sorted(levels))
    published = {0: -1.0, 1: -0.6961928009986877, 6: -0.09105003625154495, 7: 0.0}  # QLoRA, appendix E
    published |= {8: 0.07958029955625534, 12: 0.44070982933044434, 14: 0.7229568362236023, 15: 1.0}
    for index, value in published.items():
        assert abs(levels[index] - value) < 3e-7


@pytest.mark.parametrize(("entries", "published"), [(4, 0.11748), (8, 0.03455), (16, 0.009501), (32, 0.002505)])
def test_lloyd_max_error_is_as_published(entries: int, published: float) -> None:
    levels = torch.tensor(lloyd_max(entries), dtype=torch.float64)
    x = torch.linspace(-9, 9, 200001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    q = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert abs(float(((q - x).square() * density).sum()) - published) < 1e-5


@pytest.mark.parametrize("entries", [4, 5, 7, 16, 100, 255, 256])
def test_lloyd_max_meets_lloyds_conditions(entries: int) -> None:
    levels = torch.tensor(lloyd_max(entries), dtype=torch.float64)
    assert bool((levels.diff() > 0).all()) and torch.equal(levels, -levels.flip(0))
    middle = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([middle.new_tensor([-math.inf]), middle, middle.new_tensor([math.inf])])
    mass = torch.special.ndtr(edges).diff()
    mean = -(torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)).diff() / mass
    assert (mean - levels).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_and_error(shape: tuple[int, int], kind: dict, rng_weight) -> None:
    scheme = LutScheme(**kind)
    if scheme.group_size > shape[1]:
        pytest.skip("the group is wider than the weight")
    w = rng_weight(*shape)
    qt = quantize_tensor(w, scheme)
    assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == field_specs(scheme, shape)
    assert qt.nbytes == stored_bytes(scheme, shape)
    groups = 0 if not scheme.scaled else -(-shape[1] // scheme.group_size) if scheme.group_size else 1
    tables = shape[0] if scheme.table_scope == "row" else 1
    count = shape[0] * (-(-shape[1] * scheme.bits // 8) + 2 * groups) + 2 * tables * scheme.entries
    assert qt.bits_per_weight == 8 * count / w.numel()
    q = qt.dequantize()
    assert mse(w, q) < (3 if not scheme.values else 8) * 4.0 ** -math.log2(scheme.entries) * float(w.square().mean())
    # every weight has the nearest level of its table
    table = qt.fields["table"].float().reshape(tables, 1, -1)
    scale = qt.fields["scale"].float() if scheme.scaled else torch.ones(shape[0], 1)
    column_scale = scale.repeat_interleave(scheme.group_size or shape[1], 1)[:, : shape[1]]
    nearest = (table * column_scale[..., None] - w[..., None]).abs().amin(-1)
    assert ((q - w).abs() <= nearest + 1e-5 * w.abs().max()).all()


def test_golden_bytes() -> None:
    values = (-2.0, -1.0, 0.0, 0.5, 4.0)
    scheme = LutScheme(table="values", entries=5, values=values)
    row = torch.tensor([-2.0, -1.0, 0.0, 0.5, 4.0, 4.0, -2.0, 0.5, 0.5])
    w = torch.stack([row, -row])
    qt = quantize_tensor(w / 2, scheme)
    assert qt.fields["scale"].tolist() == [[0.5], [-0.5]]  # the table is turned round for the second row
    codes = [0, 1, 2, 3, 4, 4, 0, 3, 3]
    stream = sum(c << (3 * i) for i, c in enumerate(codes)).to_bytes(4, "little")
    assert bytes(qt.fields["codes"][:4].tolist()) == stream
    assert stream.hex() == "88466203"
    assert qt.fields["table"].tolist() == list(values)
    assert torch.equal(qt.dequantize(), w / 2)


def test_errors_on_n01(rng_weight) -> None:
    w = rng_weight(32, 4096)
    for entries, theory in ((4, 0.11748), (8, 0.03455), (16, 0.0095)):
        assert abs(mse(w, quantize_tensor(w, LutScheme(entries=entries)).dequantize()) / theory - 1) < 0.01
        kmeans = LutScheme(entries=entries, table="kmeans", scaled=False)
        assert abs(mse(w, quantize_tensor(w, kmeans).dequantize()) / theory - 1) < 0.02
        rows = LutScheme(entries=entries, table="kmeans", table_scope="row", scaled=False)
        assert 0.9 < mse(w, quantize_tensor(w, rows).dequantize()) / theory < 1.01
    small = rng_weight(128, 576)
    lloyd, normal = (
        mse(small, quantize_tensor(small, LutScheme(table=t, group_size=64)).dequantize()) for t in ("lloyd", "nf4")
    )
    assert lloyd < 0.0071 and normal < 0.0070
    # a short row does not reach the outermost of 256 levels: its best scale is above the one that covers it
    assert mse(small, quantize_tensor(small, LutScheme(entries=256)).dequantize()) < 5e-5
    scale = small.view(128, 9, 64).abs().amax(-1, keepdim=True)  # the convention of QLoRA
    levels = torch.tensor(nf4())
    absmax = levels[torch.bucketize(small.view(128, 9, 64) / scale, (levels[1:] + levels[:-1]) / 2)] * scale
    assert normal < 0.9 * mse(small, absmax.view(128, 576))


def test_kmeans_finds_clusters_exactly() -> None:
    centres = torch.tensor([-7.0, -1.0, 0.25, 2.0, 64.0])
    w = centres[torch.randint(0, 5, (3, 400), generator=torch.Generator().manual_seed(0))]
    for scope in ("row", "tensor"):
        scheme = LutScheme(table="kmeans", table_scope=scope, entries=5, scaled=False)
        qt = quantize_tensor(w, scheme)
        assert torch.equal(qt.dequantize(), w)
        assert torch.equal(qt.dequantize(), quantize_tensor(w, scheme).dequantize())


def test_kmeans_against_plain_lloyd(rng_weight) -> None:
    x, weight = rng_weight(2, 500), rng_weight(2, 500, seed=1).square()
    levels = kmeans_1d(x, weight, 7)
    index = (x[..., None] - levels[:, None]).abs().argmin(-1)
    for row in range(2):
        for k in range(7):
            inside = index[row] == k
            mean = (x[row] * weight[row])[inside].sum() / weight[row][inside].sum()
            assert abs(float(mean - levels[row, k])) < 1e-3
    assert bool((levels.diff(dim=-1) > 0).all())


def test_kmeans_weighs_by_importance(rng_weight) -> None:
    w, energy = rng_weight(16, 256), torch.exp(2 * rng_weight(256, seed=1))
    stats = Stats(energy.diag(), energy.sqrt(), 1)
    for scope in ("row", "tensor"):
        w_row = w * torch.exp(rng_weight(256, seed=2))  # columns of different size, so that one table must choose
        scheme = LutScheme(table="kmeans", entries=8, table_scope=scope, scaled=False)
        plain = output_error(w_row, quantize_tensor(w_row, scheme).dequantize(), stats)
        assert output_error(w_row, quantize_tensor(w_row, scheme, stats=stats).dequantize(), stats) < 0.95 * plain


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeros_and_constants(kind: dict) -> None:
    w = torch.zeros(4, 96)
    w[1], w[2, ::3] = 0.5, -1.0
    q = quantize_tensor(w, LutScheme(**kind)).dequantize()
    assert bool(q.isfinite().all())
    if kind["table"] == "nf4" or kind.get("scaled") is False:
        assert (q - w).abs().max() < 1e-3
    assert (q[0].abs().max() < 1e-3) and (q[1] - w[1]).abs().max() < 0.01


def test_range_of_fp16(rng_weight) -> None:
    w = rng_weight(4, 64)
    for scheme in (LutScheme(table="kmeans", scaled=False), LutScheme()):
        with pytest.raises(SchemeError, match="fp16"):
            quantize_tensor(w * 1e6, scheme)
        assert output_error(w * 1e-3, quantize_tensor(w * 1e-3, scheme).dequantize(), None) < 0.02


def test_a_kmeans_table_comes_from_fit(rng_weight) -> None:
    grid = get_codec("lut").grid(LutScheme(table="kmeans"), (4, 16), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="fit"):
        grid.nearest(rng_weight(4, 16), torch.arange(16))


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_stack_and_unstack(scope: str, rng_weight) -> None:
    scheme = LutScheme(table="kmeans", entries=6, table_scope=scope, group_size=32, transforms=("rotate",))
    parts = [quantize_tensor(rng_weight(6, 77, seed=seed), scheme) for seed in range(3)]
    joined = stack(parts)
    assert torch.equal(joined.dequantize(), torch.stack([p.dequantize() for p in parts]))
    for part, again in zip(parts, unstack(joined), strict=True):
        assert all(torch.equal(part.fields[k], again.fields[k]) for k in part.fields)
