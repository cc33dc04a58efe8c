"""Error feedback for codes of any block size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitpalette.quant.codec import get_codec
from bitpalette.quant.factor import inverse_factor
from bitpalette.quant.ldlq import feed_back, feedback_share, overloaded_rows
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats, output_error


def stats_of(n: int, seed: int = 0) -> Stats:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5)
    x = x * torch.exp(0.5 * torch.randn(n, generator=generator))
    return Stats(x.T @ x / len(x), x.abs().mean(0), len(x))


class Noise:
    """A grid whose error is white and known: rounding as in the theory of `feedback_share`."""

    def __init__(self, size: float) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(1)

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.size * torch.randn(w.shape, generator=self.generator)
        return torch.zeros(w.shape[0], 1, dtype=torch.uint8), w + noise


def by_definition(w: Tensor, h: Tensor, block: int, noise: Noise) -> Tensor:
    """Block after block, what remains solved anew: the exact minimum over all later columns, in float64."""
    rest, n = w.double(), w.shape[1]
    h = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    out = torch.empty_like(rest)
    for i in range(0, n, block):
        j = min(i + block, n)
        out[:, i:j] = noise.nearest(rest[:, i:j].float(), torch.arange(i, j))[1].double()
        error = rest[:, i:j] - out[:, i:j]
        # minimise tr([-error, D] H [-error, D]^T) over D, the change of later columns
        rest[:, j:] += torch.linalg.solve(h[j:, j:], h[j:, i:j] @ error.T).T
    return out.float()


@pytest.mark.parametrize(("n", "block"), [(40, 16), (300, 16), (35, 2)])
def test_feedback_by_definition(n: int, block: int) -> None:
    w, stats = torch.randn(5, n, generator=torch.Generator().manual_seed(3)), stats_of(n)
    width = 2 if block == 2 else 16
    want = by_definition(w, stats.hessian, width, Noise(0.1))
    _, got = feed_back(w, Noise(0.1), block, inverse_factor(stats.hessian))  # type: ignore[arg-type]
    assert torch.allclose(got, want, atol=2e-3)


def test_the_share_that_feedback_leaves() -> None:
    """rho predicts the output error of white rounding errors, with feedback by without."""
    w, stats = torch.randn(400, 128, generator=torch.Generator().manual_seed(4)), stats_of(128)
    _, q = feed_back(w, Noise(0.1), 16, stats.factor())  # type: ignore[arg-type]
    plain = w + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5))
    measured = output_error(w, q, stats) / output_error(w, plain, stats)
    assert measured == pytest.approx(feedback_share(stats), rel=0.1)  # damped, rho is a little high
    assert 0.05 < feedback_share(stats) < 0.95
    diagonal = Stats(torch.diag(torch.rand(64) + 0.5), torch.ones(64), 64)
    assert feedback_share(diagonal) == pytest.approx(1.01, abs=0.005)  # the damping adds its hundredth


@pytest.mark.parametrize("values", [{"codec": "int", "bits": 3, "group_size": 32}, {"codec": "trellis", "window": 12}])
def test_feedback_pays_and_is_the_same_with_shared_statistics(values: dict) -> None:
    stats = stats_of(96)
    scheme = Scheme.from_dict({**values, "transforms": ["rotate", "order"]})
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(6))
    fed = quantize_tensor(w, scheme, solver="ldlq", stats=stats)
    assert output_error(w, fed.dequantize(), stats) < 0.75 * output_error(
        w, quantize_tensor(w, scheme, stats=stats).dequantize(), stats
    )
    assert stats.derived is not None  # the next layer with this input finds the rotated Hessian and its factor
    again = quantize_tensor(w, scheme, solver="ldlq", stats=stats)
    fresh = quantize_tensor(w, scheme, solver="ldlq", stats=Stats(stats.hessian, stats.absmean, stats.tokens))
    assert all(torch.equal(fed.fields[k], other.fields[k]) for other in (again, fresh) for k in fed.fields)
    other_seed = quantize_tensor(w, scheme, solver="ldlq", stats=stats, seed=9)
    assert not torch.equal(other_seed.fields["signs"], fed.fields["signs"])


def test_a_row_with_an_outlier_on_a_loud_input_is_repaired(rng_weight) -> None:
    """A weight at 9 sigma on an input of great energy: the code ends at 3.5 sigma, and the row would be lost."""
    w = rng_weight(64, 64) * 0.1
    w[37, 0] = 0.9 * 1.5
    energy = torch.ones(64)
    energy[0] = 20.0
    stats = Stats(torch.diag(energy), energy.sqrt(), 64)
    scheme = Scheme.from_dict({"codec": "trellis", "rate": 4, "window": 12})
    grid = get_codec("trellis").grid(scheme, (64, 64), w.device)
    grid.fit(w)
    _, lost = feed_back(w, grid, 16, stats.factor())
    assert overloaded_rows(w, lost, stats.hessian).tolist() == [37]
    q = quantize_tensor(w, scheme, solver="ldlq", stats=stats).dequantize()
    assert len(overloaded_rows(w, q, stats.hessian)) == 0
    error = [(((w - v) @ stats.hessian) * (w - v)).sum(1) for v in (lost, q)]
    assert error[1][37] < 0.2 * error[0][37]
    others = [r for r in range(64) if not 32 <= r < 48]  # tiles of 16 rows are coded again as a whole, others not
    assert torch.equal(q[others], lost[others])
