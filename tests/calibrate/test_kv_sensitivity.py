"""Errors of attention output are those of a cache that really holds the bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitpalette.calibrate.kv_collect import Attended, observing, query_positions, run
from bitpalette.calibrate.kv_sensitivity import OutputErrors, candidate_pairs, outputs, projection
from bitpalette.calibrate.kv_sensitivity import _Stored as Stored
from bitpalette.kernels import kv_reference
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.quant.kv_format import KVError, KVFormat

N, WINDOW, SINKS = 60, 9, 3
PAIRS = candidate_pairs(16, 16)


def attended(softcap: float | None, sliding: int | None, logits: bool, seed: int = 0) -> Attended:
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, N, 16, generator=g) for heads in (4, 2, 2))
    sink_logits = torch.randn(4, generator=g) if logits else None
    return Attended(0, torch.nn.Identity(), query, key + 2, value, 0.25, softcap, sliding, sink_logits)


def token_by_token(seen: Attended, mean: Tensor | None, pair: tuple[int, int]) -> Tensor:
    """[n, heads * D] of a cache that gets one token after another."""
    rows = KVRows(KVFormat(*pair, sinks=SINKS, window=WINDOW), 1, 2, 16, 16, torch.float32, torch.device("cpu"), mean)
    skip, parts = np.zeros(1, np.int64), []
    for t in range(N):
        new = rows.stored(seen.key[:, :, t : t + 1], seen.value[:, :, t : t + 1])
        query = seen.query[:, :, t : t + 1]
        options = (seen.softcap, seen.sliding_window, seen.sink_logits)
        parts.append(kv_reference.attention(query, rows, new, skip, seen.scaling, *options, dtype=torch.float64))
        rows.append(*new, skip)
    return torch.cat(parts, 2)[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("pair", [(3, 2), (2, 16), (16, 4), (8, 8)])
@pytest.mark.parametrize(
    ("softcap", "sliding", "logits"), [(None, None, False), (1.5, None, False), (None, 30, False), (None, None, True)]
)
def test_outputs_are_those_of_the_cache(
    pair: tuple[int, int], softcap: float | None, sliding: int | None, logits: bool
) -> None:
    seen = attended(softcap, sliding, logits)
    # a softmax that sees more than differences of scores allows no centering
    mean = torch.full((2, 16), 1.8) if softcap is None and not logits else None
    at = query_positions(N, 0, N)
    stored = Stored(seen.key[0], seen.value[0], mean, PAIRS)
    exact, quantized = outputs(seen, seen.query[0], at, stored, PAIRS, SINKS, WINDOW)
    assert set(quantized) == set(PAIRS)
    expected = token_by_token(seen, mean, pair)
    assert (quantized[pair] - expected).abs().max() <= 2e-5
    assert (quantized[pair] - exact).abs().max() > 1e-4
    assert (exact - token_by_token(seen, mean, (16, 16))).abs().max() <= 2e-5


def test_errors_are_relative_and_behind_the_projection() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=99, **sizes, head_dim=16, num_hidden_layers=2, initializer_range=0.15)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(4, 90, (2, 48), generator=torch.Generator().manual_seed(0))
    layers, pairs = frozenset([0, 1]), candidate_pairs(16, 16)
    errors = OutputErrors(layers, {}, pairs, (0, 4), 8, queries=100)
    with observing(model, errors):
        run(model, {48: tokens})
    assert errors.widths[0] == (2, 16, 16)
    for layer in layers:
        found = errors.relative(layer, 48, 4)
        assert len(found) == 24
        assert found["k2v2"] > found["k3v3"] > found["k4v4"] > found["k8v8"] > 0
        assert found["k16v2"] < found["k2v2"] and found["k2v16"] < found["k2v2"]
        assert errors.relative(layer, 48, 0)["k3v3"] > found["k3v3"]  # exact sinks can only help here
    # twice the projection, the same relative error
    for block in model.model.layers:
        block.self_attn.o_proj.weight.mul_(2)
    again = OutputErrors(frozenset([0]), {}, ((3, 3),), (4,), 8, queries=100)
    with observing(model, again):
        run(model, {48: tokens})
    assert again.relative(0, 48, 4)["k3v3"] == pytest.approx(errors.relative(0, 48, 4)["k3v3"], rel=1e-4)


def test_projection_is_the_matrix_of_any_linear_module() -> None:
    holder = torch.nn.Module()
    holder.out_proj = torch.nn.Linear(6, 5)
    assert (projection(holder, 6) - holder.out_proj.weight).abs().max() <= 1e-6
    from transformers.pytorch_utils import Conv1D

    holder = torch.nn.Module()
    holder.c_proj = Conv1D(5, 6)
    assert (projection(holder, 6) - holder.c_proj.weight.T).abs().max() <= 1e-6
    with pytest.raises(KVError, match="Identity has no projection"):
        projection(torch.nn.Identity(), 6)


def test_errors_that_are_not_finite_are_refused() -> None:
    seen = attended(None, None, False)
    seen.module.o_proj = torch.nn.Linear(64, 8)
    seen.value[0, 0, 20, 0] = float("nan")
    errors = OutputErrors(frozenset([0]), {}, ((3, 3),), (SINKS,), WINDOW)
    with torch.no_grad():
        errors(seen)
    with pytest.raises(KVError, match="layer 0: attention output of k3v3 is not finite"):
        errors.relative(0, N, SINKS)


def test_candidates() -> None:
    assert len(candidate_pairs(64, 64)) == 24
    assert set(candidate_pairs(64, 60)) == {(8, 16), (4, 16), (3, 16), (2, 16)}
