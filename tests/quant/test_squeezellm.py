"""Solver `squeezellm`: better by the Fisher diagonal than what knows less, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from bitpalette.quant import native
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import get_solver, quantize_tensor
from bitpalette.quant.squeezellm import SOLVER
from bitpalette.quant.stats import Stats
from bitpalette.quant.tensor import field_specs

ROWS = LutScheme(table="kmeans", table_scope="row", scaled=False, entries=8)
needs_module = pytest.mark.skipif(not native.available_isas(), reason="the CPU extension is not built")


def stats_of(n: int, fisher: torch.Tensor | None) -> Stats:
    return Stats(torch.eye(n), torch.ones(n), 1, fisher)


@needs_module
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 123), (8, 577)], ids=str)
def test_least_loss(shape: tuple[int, int], rng_weight) -> None:
    w, fisher = rng_weight(*shape), torch.exp(2 * rng_weight(*shape, seed=1))
    qt = quantize_tensor(w, ROWS, solver="squeezellm", stats=stats_of(shape[1], fisher))
    assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == field_specs(ROWS, shape)
    loss = float((fisher * (qt.dequantize() - w).square()).sum())
    plain = float((fisher * (quantize_tensor(w, ROWS).dequantize() - w).square()).sum())
    assert loss <= 1e-6 * float(fisher.sum()) if shape[1] <= 8 else loss < 0.8 * plain
    # every weight has the nearest level of its row
    nearest = (qt.fields["table"].float()[:, None] - w[..., None]).abs().amin(-1)
    assert ((qt.dequantize() - w).abs() <= nearest + 1e-6).all()


@needs_module
def test_unused_weights_and_rows(rng_weight) -> None:
    w, fisher = rng_weight(4, 96), rng_weight(4, 96, seed=1).square()
    fisher[:, ::2], fisher[2] = 0, 0
    q = quantize_tensor(w, ROWS, solver="squeezellm", stats=stats_of(96, fisher)).dequantize()
    assert bool(q.isfinite().all()) and (q - w)[2].square().mean() < 0.05


def test_what_it_refuses(rng_weight) -> None:
    w, fisher = rng_weight(6, 33), torch.ones(6, 33)
    assert SOLVER.needs_stats and SOLVER.needs_fisher and get_solver("squeezellm") is SOLVER

    def solve(scheme: Scheme, stats: Stats | None) -> None:
        quantize_tensor(w, scheme, solver="squeezellm", stats=stats)

    for scheme in (ROWS.replace(table_scope="tensor"), ROWS.replace(scaled=True), Scheme.from_dict({"codec": "int"})):
        with pytest.raises(SchemeError, match='table_scope "row" and scaled false; got'):
            solve(scheme, stats_of(33, fisher))
    with pytest.raises(SchemeError, match=r"takes no transforms; got .*rotate"):
        solve(ROWS.replace(transforms=("rotate",)), stats_of(33, fisher))
    with pytest.raises(ValueError, match="needs calibration statistics"):
        solve(ROWS, None)
    with pytest.raises(ValueError, match=r"needs the Fisher diagonal .*Stats\.fisher"):
        solve(ROWS, stats_of(33, None))
    with pytest.raises(ValueError, match=r"\[5, 33\] is not of the weight \[6, 33\]"):
        solve(ROWS, stats_of(33, fisher[:5]))
    for bad in (-1.0, float("nan"), float("inf")):
        broken = fisher.clone()
        broken[3, 4] = bad
        with pytest.raises(ValueError, match="negative, NaN or infinite"):
            solve(ROWS, stats_of(33, broken))
    with pytest.raises(ValueError, match=r"fisher \[6, 32\] is not \[out_features, 33\]"):
        stats_of(33, fisher[:, :32])
