"""Every registered codec with every transform and solver, on awkward shapes: a new one is tested once it is there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bitpalette.quant.codec import codec_names, get_codec
from bitpalette.quant.registry import registered
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import get_solver, quantize_tensor, solver_names
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.tensor import QuantizedTensor, field_specs
from bitpalette.quant.transform import transform_names

SHAPES = [(1, 1), (3, 17), (17, 123), (8, 577), (5, 1537)]
MORE: dict[str, list[dict[str, Any]]] = {  # beside a codec's defaults
    "int": [
        {"bits": 3, "group_size": 16, "symmetric": False},
        {"bits": 8, "per_input_channel": True},
        {"group_size": 16, "symmetric": False, "progressive": True},
    ],
    "float": [
        {"element": "e4m3"},
        {"group_size": 32, "scale_format": "e8m0", "element": "e3m2"},
        {"group_size": 16, "scale_format": "e4m3"},
    ],
    "trellis": [{"rate": 3.0625, "window": 12}, {"rate": 4.5, "window": 14}],
    "lut": [
        {"table": "kmeans", "table_scope": "row", "entries": 9},
        {"table": "kmeans", "scaled": False},
        {"dims": 2, "entries": 64},
    ],
}
SCHEMES = [{"codec": name, **more} for name in codec_names() for more in [{}, *MORE.get(name, [])]]
SOLVERS = [name for name in solver_names() if not getattr(get_solver(name), "needs_fisher", False)]
CHAINS = [chain for n in range(3) for chain in itertools.permutations(transform_names(), n)]


def stats_of(n: int) -> Stats:
    """Correlated inputs of very different sizes; one in nine columns is never used."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(64, n, generator=generator) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=generator) / n**0.5)
    x = x * torch.exp(torch.randn(n, generator=generator))
    x[:, 8::9] = 0
    return Stats(x.T @ x / 64, x.abs().mean(0), 64)


def test_names() -> None:
    assert {"float", "int", "lut"} <= set(codec_names())
    assert {"rotate", "scale"} <= set(transform_names())
    assert {"rtn", "gptq"} <= set(solver_names())
    for marker in ("CODEC", "TRANSFORM", "SOLVER"):
        assert all(name == entry.name for name, entry in registered(marker).items())
    for name in codec_names():
        assert get_codec(name).scheme_class.codec == name
        assert 0 < get_codec(name).tolerance(get_codec(name).scheme_class()) < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", SCHEMES, ids=str)
def test_every_combination_comes_close(values: dict[str, Any], shape: tuple[int, int], rng_weight) -> None:
    scheme = Scheme.from_dict(values)
    if values.get("group_size", 0) > shape[1]:
        pytest.skip("the group is wider than the weight")
    w, stats = rng_weight(*shape), stats_of(shape[1])
    for chain in CHAINS if shape[1] <= 200 else [c for c in CHAINS if len(c) <= 1]:
        for solver in SOLVERS:
            if solver != "rtn" and (shape[1] > 600 or len(chain) == 1):
                continue
            if scheme.block > 1 and solver == "gptq":
                continue
            chosen = scheme.replace(transforms=chain)
            qt = quantize_tensor(w, chosen, solver=solver, stats=stats, seed=3)
            specs = field_specs(chosen, shape)
            assert {k: (tuple(t.shape), t.dtype) for k, t in qt.fields.items()} == specs
            q = qt.dequantize()
            assert q.shape == w.shape and q.dtype == torch.float32
            assert output_error(w, q, stats) <= 0.06, (chain, solver)  # NaN fails
            if solver == "rtn":  # feedback puts errors where inputs are quiet
                assert output_error(w, q, None) <= 0.5, (chain, solver)
            assert torch.equal(QuantizedTensor(chosen, shape, dict(qt.fields)).to("cpu").dequantize(), q)


@pytest.mark.parametrize("values", SCHEMES, ids=str)
def test_the_same_every_time(values: dict[str, Any], rng_weight) -> None:
    w, stats = rng_weight(6, 33), stats_of(33)
    scheme = Scheme.from_dict(values).replace(transforms=("scale", "rotate"))
    for solver in SOLVERS:
        if scheme.block > 1 and solver == "gptq":
            continue
        a, b = (quantize_tensor(w.clone(), scheme, solver=solver, stats=stats, seed=3) for _ in range(2))
        assert all(torch.equal(a.fields[k], b.fields[k]) for k in field_specs(scheme, (6, 33)))
        other = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=4)
        assert not torch.equal(a.fields["signs"], other.fields["signs"])


@pytest.mark.parametrize("values", SCHEMES, ids=str)
def test_feedback_beats_rounding_to_nearest(values: dict[str, Any], rng_weight) -> None:
    w, stats, scheme = rng_weight(24, 160), stats_of(160), Scheme.from_dict(values)
    names = ("rtn", "ldlq") if scheme.block > 1 else ("rtn", "gptq", "ldlq")
    error = {s: output_error(w, quantize_tensor(w, scheme, solver=s, stats=stats).dequantize(), stats) for s in names}
    assert max(error[name] for name in names[1:]) < 0.8 * error["rtn"]


def test_gptq_refuses_codes_of_several_columns(rng_weight) -> None:
    with pytest.raises(SchemeError, match=r"column by column.*16 at a time: use solver ldlq"):
        quantize_tensor(rng_weight(16, 16), {"codec": "trellis"}, solver="gptq", stats=stats_of(16))
