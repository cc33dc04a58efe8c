"""Divergences of several plans, block by block, against whole models with the same weights put in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitpalette.calibrate.evaluate import evaluate
from bitpalette.calibrate.measure_plan import Rounded, difference, measure_plans
from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.calibrate.structure import quantizable
from bitpalette.calibrate.whole import load_model
from bitpalette.formats.base import open_source
from bitpalette.quant.scheme import Scheme

COARSE, FINE = (Scheme.from_dict({"codec": "int", "bits": b, "group_size": 0}) for b in (2, 5))


def noisy(name: str, w: Tensor, scheme: Scheme) -> Tensor:
    """Stands in for a solver: noise by the name and the scheme."""
    generator = torch.Generator().manual_seed(len(name) + (1000 if scheme == COARSE else 0))
    size = 0.2 if scheme == COARSE else 0.05
    return w.float() + size * w.float().std() * torch.randn(w.shape, generator=generator)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe", "gemma2"])
def test_as_whole_models_have_it(family: str, checkpoint: Callable[..., Path]) -> None:
    source = open_source(str(checkpoint(family)))
    skeleton = Skeleton(source)
    weights = {k: w for k, w in quantizable(skeleton.model).items() if k not in skeleton.tied and not w.router}
    torch.manual_seed(0)
    tokens = torch.randint(0, 100, (3, 24))
    names = list(weights)
    plans = [
        dict.fromkeys(names, FINE),
        dict.fromkeys(names[::2], COARSE),
        {n: FINE if i % 2 else COARSE for i, n in enumerate(names)},
        {},
    ]
    asked: list[tuple[str, Scheme]] = []

    def rounded(index: int | None) -> Rounded:
        def one(name: str, w: Tensor, scheme: Scheme) -> Tensor:
            asked.append((name, scheme))
            assert skeleton.block_of(name) == index
            return noisy(name, w, scheme)

        return one

    found = measure_plans(skeleton, weights, tokens, plans, rounded)
    assert len(asked) == len(set(asked)), "a weight that plans share is rounded once"
    assert all(p.is_meta for p in skeleton.model.parameters()), "nothing stays in memory"
    reference = load_model(source, torch.float32)
    for plan, measured in zip(plans, found, strict=True):
        model = load_model(source, torch.float32)
        with torch.no_grad():
            for name, scheme in plan.items():
                model.get_parameter(name).copy_(noisy(name, model.get_parameter(name), scheme))
        want = evaluate(model, tokens, reference)
        assert abs(measured.kl - want.kl_divergence) <= 1e-5 + 1e-4 * want.kl_divergence
        assert abs(measured.perplexity / want.perplexity - 1) <= 1e-4
        assert abs(measured.reference_perplexity / want.reference_perplexity - 1) <= 1e-4
        assert abs(measured.top1 - want.top1_agreement) <= 1 / tokens.numel() + 1e-9
    assert found[3].kl <= 1e-9 < found[0].kl < found[1].kl
    gap, error = difference(found[1], found[0])
    assert abs(gap - (found[1].kl - found[0].kl)) <= 1e-12 and 0 <= error < found[1].kl
