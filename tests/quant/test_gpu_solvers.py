"""Quantizing on a GPU: every solver, and the statistics, against the CPU on a small layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.quant.native import available_isas
from bitpalette.quant.solver import quantize_tensor, solver_names
from bitpalette.quant.stats import Stats, output_error

pytestmark = pytest.mark.gpu

OUT, IN = 96, 256

INT4: dict[str, Any] = {"codec": "int", "bits": 4, "group_size": 64}
ROTATED = {**INT4, "transforms": ["rotate"]}
TRELLIS: dict[str, Any] = {"codec": "trellis", "rate": 2.5, "window": 12, "transforms": ["rotate"]}

CASES = [
    (INT4, "rtn"),
    (INT4, "gptq"),
    (INT4, "awq"),
    (INT4, "awq+gptq"),
    (ROTATED, "gptq"),
    ({**INT4, "progressive": True}, "gptq"),
    ({**INT4, "bits": 2, "symmetric": False}, "gptq"),
    ({"codec": "lut", "entries": 16, "group_size": 128}, "gptq"),
    ({"codec": "lut", "entries": 8, "table": "kmeans"}, "rtn"),
    ({"codec": "float", "element": "e4m3"}, "gptq"),
    (TRELLIS, "rtn"),
    (TRELLIS, "ldlq"),
]


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


def layer() -> tuple[Tensor, Stats]:
    g = torch.Generator().manual_seed(5)
    w = torch.randn(OUT, IN, generator=g) * 0.02
    x = torch.randn(512, IN, generator=g) * torch.linspace(0.2, 4, IN) @ torch.randn(IN, IN, generator=g) / IN**0.5
    return w, Stats(x.T @ x / len(x), x.abs().mean(0), len(x))


def moved(stats: Stats, device: torch.device) -> Stats:
    return Stats(stats.hessian.to(device), stats.absmean.to(device), stats.tokens)


def test_every_solver_is_named() -> None:
    used = {part for _, solver in CASES for part in solver.split("+")}
    assert used - {"awq"} <= set(solver_names())


@pytest.mark.parametrize(("scheme", "solver"), CASES, ids=str)
def test_a_solver(scheme: dict[str, Any], solver: str, gpu: torch.device) -> None:
    """As small an output error as on the CPU, to 2 %; sums round otherwise there, so a few codes differ."""
    if scheme["codec"] == "trellis":
        pytest.importorskip("cupy")
        if not available_isas():
            pytest.skip("the CPU extension is not built")
    w, stats = layer()
    want = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=1)
    got = quantize_tensor(w.to(gpu), scheme, solver=solver, stats=moved(stats, gpu), seed=1)
    assert got.scheme == want.scheme
    assert {t.device.type for t in got.fields.values()} == {"cuda"}
    wanted, found = (output_error(w, qt.dequantize().cpu(), stats) for qt in (want, got))
    assert found <= 1.02 * wanted, (found, wanted)
    same = (got.fields["codes"].cpu() == want.fields["codes"]).float().mean()
    assert float(same) >= 0.9 or solver != "rtn", float(same)


def test_collecting_a_hessian(gpu: torch.device) -> None:
    from bitpalette.calibrate.collect import Moment

    x = torch.randn(300, IN)
    want, got = Moment(IN), Moment(IN, gpu)
    want.add(x)
    got.add(x.to(gpu))
    stats = got.stats()
    assert stats.hessian.device == stats.absmean.device == gpu
    difference = (stats.hessian.cpu() - want.stats().hessian).abs().max()
    assert float(difference) <= 1e-4
