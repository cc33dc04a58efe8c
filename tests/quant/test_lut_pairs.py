"""Codec `lut` with dims = 2: layout, golden bytes, exactly nearest points, scales, odd widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitpalette.quant.codec import get_codec
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.lut_pairs import nearest_points
from bitpalette.quant.scheme import SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.tensor import QuantizedTensor, field_specs, stack, stored_bytes, unstack

SHAPES = [(1, 1), (2, 2), (17, 123), (8, 577), (5, 1537), (64, 576)]
KINDS: list[dict[str, Any]] = [
    {"entries": 4},
    {"entries": 16},
    {"entries": 37, "group_size": 34},
    {"entries": 64, "group_size": 64},
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_and_nearest(shape: tuple[int, int], kind: dict, rng_weight) -> None:
    scheme = LutScheme(dims=2, **kind)
    if scheme.group_size > shape[1]:
        pytest.skip("the group is wider than the weight")
    w = rng_weight(*shape)
    qt = quantize_tensor(w, scheme)
    assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == field_specs(scheme, shape)
    pairs, groups = -(-shape[1] // 2), -(-shape[1] // (scheme.group_size or shape[1]))
    bits = {4: 2, 16: 4, 37: 6, 64: 6}[scheme.entries]
    assert qt.nbytes == stored_bytes(scheme, shape)
    assert qt.nbytes == shape[0] * (-(-pairs * bits // 8) + 2 * groups) + 4 * scheme.entries
    q = qt.dequantize()
    assert q.shape == w.shape
    # no other point of the table is nearer to any pair, the last one filled up with a zero
    scale = qt.fields["scale"].float().repeat_interleave(scheme.group_size or shape[1], 1)[:, : shape[1]]
    u = torch.nn.functional.pad(w / scale, (0, shape[1] % 2)).view(shape[0], -1, 1, 2)
    squares = (u - qt.fields["table"].float()).square().sum(-1)
    chosen = torch.nn.functional.pad((q - w) / scale, (0, shape[1] % 2)).view(shape[0], -1, 2).square().sum(-1)
    whole = shape[1] // 2  # the padding's own error is not in q
    assert (chosen[:, :whole] <= squares.amin(-1)[:, :whole] + 1e-5).all()
    assert (chosen <= squares.amin(-1) + 1e-5).all()


def test_golden_bytes() -> None:
    """Eleven columns, six codes of three bits."""
    scheme = LutScheme(entries=5, dims=2)
    table = nearest_points(5, CPU).table
    codes = torch.tensor([[4, 0, 3, 1, 2, 0], [0, 0, 1, 4, 4, 3]], dtype=torch.uint8)
    grid = get_codec("lut").grid(scheme, (2, 11), CPU)
    fields = grid.pack(codes)
    assert [f"{b:02x}" for b in fields["codes"].tolist()] == ["c4", "22", "00", "40", "c8", "01"]
    assert fields["table"].shape == (5, 2) and fields["table"].dtype == torch.float16
    fields["scale"] = torch.tensor([[0.5], [2.0]], dtype=torch.float16)
    w = QuantizedTensor(scheme, (2, 11), fields).dequantize()
    assert torch.equal(w, (table[codes.long()] * torch.tensor([0.5, 2.0])[:, None, None]).view(2, 12)[:, :11])
    # and back: these weights are on the grid, which a scale of the search reaches
    again = get_codec("lut").grid(scheme, (2, 11), CPU)
    again.scale = fields["scale"].float()
    found, values = again.nearest(w[:, :10], torch.arange(10))
    assert torch.equal(found, codes[:, :5]) and torch.equal(values, w[:, :10])
    found, values = again.nearest(w[:, 4:10], torch.arange(4, 10))
    assert torch.equal(found, codes[:, 2:5]) and found.dtype == torch.uint8
    assert again.nearest(w[:, 10:], torch.tensor([10]))[1].shape == (2, 1)


@pytest.mark.parametrize("entries", [4, 5, 16, 100])
def test_the_look_up_is_exact(entries: int, rng_weight) -> None:
    points = nearest_points(entries, CPU)
    edge = points.half_width
    places = torch.cat([rng_weight(40000, 2), 3 * rng_weight(4000, 2, seed=1), points.table, 1e4 * points.table])
    places = torch.cat([places, torch.tensor([[edge, 0], [-edge, edge], [0, -edge], [1e30, 1e30], [0, 0]])])
    difference = places[:, None] - points.table
    squares = difference[..., 0] ** 2 + difference[..., 1] ** 2
    code = points.nearest(places)
    assert torch.equal(squares.gather(1, code[:, None].long())[:, 0], squares.amin(1))
    assert torch.equal(points.nearest(points.table), torch.arange(entries, dtype=torch.int32))
    inside = places.abs().amax(1) < edge
    about = points.about_nearest(places[inside].clone())
    farther = (about - places[inside]).norm(dim=1) - squares[inside].amin(1).sqrt()
    assert farther.max() < 4 * edge / 256 and (farther < 1e-6).float().mean() > 0.8


@pytest.mark.parametrize(("entries", "theory"), [(16, 0.10760), (64, 0.02953)])
def test_error_on_n01(entries: int, theory: float, rng_weight) -> None:
    w = rng_weight(32, 4096)
    error = float((quantize_tensor(7 * w, LutScheme(entries=entries, dims=2)).dequantize() / 7 - w).square().mean())
    assert abs(error / theory - 1) < 0.01
    line = LutScheme(entries=round(entries**0.5))
    assert error < 0.93 * float((quantize_tensor(w, line).dequantize() - w).square().mean())


def test_scales_are_searched(rng_weight) -> None:
    """Against forty scales around the root mean square of each group, on weights of heavy tails."""
    w = rng_weight(24, 256) * torch.exp(0.7 * rng_weight(24, 256, seed=1))
    scheme = LutScheme(entries=16, group_size=64, dims=2)
    error = (quantize_tensor(w, scheme).dequantize() - w).square().view(24, 4, 64).sum(-1)
    grid = get_codec("lut").grid(scheme, (24, 256), CPU)
    rms = w.view(24, 4, 64).square().mean(-1).sqrt()
    best = torch.full_like(rms, torch.inf)
    for step in range(40):
        grid.scale = (rms * 6 * 0.93**step).half().float()
        tried = (grid.nearest(w, torch.arange(256))[1] - w).square().view(24, 4, 64).sum(-1)
        best = torch.minimum(best, tried)
    assert error.sum() < 1.01 * best.sum() and (error / best).max() < 1.15
    # rows that one large weight dominates: .160 without scales above 2.1 times the root mean square
    w = rng_weight(64, 576) / 50
    w[:, 7] = torch.arange(1, 65) / 16
    error = (quantize_tensor(w, LutScheme(entries=16, dims=2)).dequantize() - w).square().sum(1) / w.square().sum(1)
    assert error.mean() < 0.14


def test_scales_weigh_importance(rng_weight) -> None:
    w, energy = rng_weight(16, 97), torch.exp(2 * rng_weight(97, seed=1))
    w = w * torch.exp(rng_weight(97, seed=2))
    stats = Stats(energy.diag(), energy.sqrt(), 1)
    scheme = LutScheme(entries=16, dims=2)
    plain = output_error(w, quantize_tensor(w, scheme).dequantize(), stats)
    assert output_error(w, quantize_tensor(w, scheme, stats=stats).dequantize(), stats) < 0.97 * plain


def test_zeros_constants_and_range() -> None:
    w = torch.zeros(5, 97)
    w[1], w[2, ::3], w[3, 40], w[4] = 0.5, -1.0, 9.0, 1e-7
    for entries in (16, 64):
        q = quantize_tensor(w, LutScheme(entries=entries, dims=2)).dequantize()
        assert bool(q.isfinite().all()) and not q[0].any()
        assert (q[1] - w[1]).abs().max() < 0.2 and abs(float(q[3, 40]) - 9) < 4.5
    with pytest.raises(SchemeError, match="fp16"):
        quantize_tensor(w * 1e7, LutScheme(dims=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": 3}, "dims is a whole number, 1 to 2; got 3"),
        ({"dims": True}, "True"),
        ({"dims": 2, "table": "nf4"}, "dims 2 needs the table \"lloyd\"; got 'nf4'"),
        ({"dims": 2, "table": "kmeans"}, "dims 2"),
        ({"dims": 2, "group_size": 33}, "group_size is even; got 33"),
    ],
)
def test_schemes_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        LutScheme(**values)


def test_feedback_pair_by_pair(rng_weight) -> None:
    x = rng_weight(400, 96, seed=1) @ rng_weight(96, 96, seed=2)
    stats = Stats(x.T @ x / 400, x.abs().mean(0), 400)
    w, scheme = rng_weight(24, 96), LutScheme(entries=16, dims=2, transforms=("rotate",))
    error = {
        s: output_error(w, quantize_tensor(w, scheme, solver=s, stats=stats).dequantize(), stats)
        for s in ("rtn", "ldlq")
    }
    assert error["ldlq"] < 0.75 * error["rtn"]
    with pytest.raises(SchemeError, match="2 at a time: use solver ldlq"):
        quantize_tensor(w, scheme, solver="gptq", stats=stats)


def test_stack_and_unstack(rng_weight) -> None:
    scheme = LutScheme(entries=16, dims=2, group_size=32, transforms=("rotate",))
    parts = [quantize_tensor(rng_weight(6, 77, seed=seed), scheme) for seed in range(3)]
    joined = stack(parts)
    assert torch.equal(joined.dequantize(), torch.stack([p.dequantize() for p in parts]))
    for part, again in zip(parts, unstack(joined), strict=True):
        assert all(torch.equal(part.fields[k], again.fields[k]) for k in part.fields)
