"""Expected errors against those of whole weights that are quantized for real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.calibrate.expected_error import expected_errors, gaussian_error, sample_rows
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats

TRELLIS = [
    Scheme.from_dict({"codec": "trellis", "rate": rate, "window": 12, "transforms": ["rotate", "order"]})
    for rate in (1.5, 2.0, 2.75, 3.0, 4.0)
]
INT = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 32, "transforms": ["rotate"]})
ROUNDED = Scheme.from_dict({"codec": "int", "bits": 3, "group_size": 0})


def case(out: int = 256, n: int = 160) -> tuple[Tensor, Stats, Tensor]:
    """A weight, correlated inputs with channels of very different sizes, and importances of rows over two decades."""
    torch.manual_seed(3)
    z = torch.randn(2048, n // 4) @ torch.randn(n // 4, n) + 0.3 * torch.randn(2048, n)
    z *= torch.logspace(-1, 1, n)
    w = torch.randn(out, n) * torch.logspace(-0.5, 0.5, out)[:, None]
    return w, Stats(z.T @ z / len(z), z.abs().mean(0), len(z)), torch.logspace(0, -2, out)


def true_error(w: Tensor, scheme: Scheme, solver: str, stats: Stats, rows: Tensor) -> float:
    """In units of white noise, rows weighted by their part in alpha."""
    d = (quantize_tensor(w, scheme, solver=solver, stats=stats).dequantize() - w).double()
    h = stats.hessian.double()
    output = (rows.double() * ((d @ h) * d).sum(1)).sum() / h.trace()
    alpha = (rows.double() * w.double().square().mean(1)).sum()
    return float(output / alpha)


@pytest.mark.parametrize("scheme", [*TRELLIS, INT], ids=str)
def test_it_is_what_quantizing_gives(scheme: Scheme) -> None:
    w, stats, rows = case()
    solvers = dict.fromkeys([*TRELLIS, INT], "ldlq")
    found = expected_errors(w, solvers, stats, rows, 0)[scheme]
    want = true_error(w, scheme, "ldlq", stats, rows)
    assert abs(found.output / want - 1) <= 0.2
    assert 0 < found.standard_error <= 0.2 * found.output


def test_rounding_to_nearest_and_tables() -> None:
    w, stats, rows = case()
    found = expected_errors(w, {ROUNDED: "rtn"}, None, None, 0)[ROUNDED]
    d = quantize_tensor(w, ROUNDED).dequantize() - w
    table = float((d.square().sum(1) / w.square().sum(1) * w.square().sum(1)).sum() / w.square().sum())
    assert abs(found.table / table - 1) <= 0.15 and found.output == found.table
    with_inputs = expected_errors(w, {ROUNDED: "rtn"}, stats, rows, 0)[ROUNDED]
    assert abs(with_inputs.output / true_error(w, ROUNDED, "rtn", stats, rows) - 1) <= 0.25


def test_rows_are_drawn_by_their_part() -> None:
    w = torch.ones(100, 8)
    importance = torch.zeros(100)
    importance[17], importance[40] = 3.0, 1.0
    rows, counts = sample_rows(w, importance, 0, 32)
    assert rows.tolist() == [17, 40] and counts.sum() == 32 and abs(float(counts[0]) - 24) <= 1
    rows, counts = sample_rows(torch.zeros(5, 8), None, 0, 32)
    assert rows.tolist() == [0, 1, 2, 3, 4] and counts.sum() == 32


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({"codec": "trellis", "rate": 3.0, "window": 12}, 0.0190),
        ({"codec": "int", "bits": 8, "group_size": 0}, 7.7e-5),
    ],
    ids=str,
)
def test_error_on_a_normal_source(values: dict[str, Any], want: float) -> None:
    plain, rotated = Scheme.from_dict(values), Scheme.from_dict({**values, "transforms": ["rotate"]})
    assert abs(gaussian_error(plain) / want - 1) <= 0.15 and gaussian_error(rotated) == gaussian_error(plain)
