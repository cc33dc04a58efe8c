"""Statistics of layers' inputs against plain sums over what the layers were called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.calibrate import collect
from bitpalette.calibrate.collect import Moment, collecting, expert_stats, finished
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.structure import quantizable
from bitpalette.quant.stats import Stats


def assert_close(got: Tensor, want: Tensor) -> None:
    assert float((got.double() - want.double()).norm()) <= 1e-5 * float(want.double().norm())


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of x x^T, mean of |x|) over tokens, in float64."""
    x = x.double().reshape(-1, x.shape[-1])
    return x.T @ x / len(x), x.abs().mean(0)


@pytest.mark.parametrize("features", [1, 17, 64, 123])
@pytest.mark.parametrize("panel", [16, 64, 512])
@pytest.mark.parametrize("release", [False, True])
def test_moment(features: int, panel: int, release: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PANEL", panel)
    generator = torch.Generator().manual_seed(features)
    parts = [torch.randn(2, 5, features, generator=generator) + 1, torch.randn(7, features, generator=generator)]
    moment = Moment(features)
    for part in parts:
        moment.add(part)
    stats = moment.stats(release)
    hessian, absmean = plain(torch.cat([p.reshape(-1, features) for p in parts]))
    assert stats.tokens == 17
    assert_close(stats.hessian, hessian)
    assert_close(stats.absmean, absmean)
    assert torch.equal(stats.hessian, stats.hessian.T)
    if not release:
        assert torch.equal(moment.stats().hessian, stats.hessian)


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    x = torch.full((4096, 3), 0.1, dtype=torch.bfloat16)
    moment = Moment(3)
    moment.add(x)
    assert_close(moment.stats().hessian, plain(x)[0])


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    """What a module is called with."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    (x,) = seen
    return x


def test_every_family(families: Any, family: str, ids: Tensor) -> None:
    """Linear layers and Conv1D, in two batches."""
    model = families[family]()
    weights = {n: w for n, w in quantizable(model).items() if w.kind in ("linear", "conv1d")}
    with collecting(model, weights) as moments, torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    done = finished(dict(moments))
    assert set(done) == set(weights)
    for name, weight in weights.items():
        stats = done[name]
        assert isinstance(stats, Stats)
        rows = [inputs_of(model, weight.module_name, row[None]) for row in ids]
        hessian, absmean = plain(torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]))
        assert stats.tokens == ids.numel(), name
        assert_close(stats.hessian, hessian)
        assert_close(stats.absmean, absmean)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_layers_that_see_the_same_input_share(families: Any, ids: Tensor) -> None:
    model = families["llama"]()
    weights = {n: w for n, w in quantizable(model).items() if w.kind == "linear"}
    with collecting(model, weights) as moments, torch.no_grad():
        model(input_ids=ids)
    block = "model.layers.1."
    q, k, v, o = (moments[f"{block}self_attn.{n}_proj.weight"] for n in "qkvo")
    assert q is k is v and q is not o
    assert moments[block + "mlp.gate_proj.weight"] is moments[block + "mlp.up_proj.weight"]
    assert q is not moments["model.layers.0.self_attn.q_proj.weight"]
    done = finished(moments)
    assert done[f"{block}self_attn.q_proj.weight"] is done[f"{block}self_attn.v_proj.weight"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_experts(family: str, families: Any, ids: Tensor) -> None:
    """Each from the tokens routed to it, against a forward written out token by token."""
    model = families[family]()
    weights = {n: w for n, w in quantizable(model).items() if w.kind == "experts"}
    calls: list[tuple[Any, ...]] = []
    module_name = next(reversed(weights.values())).module_name
    module = model.get_submodule(module_name)
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    with collecting(model, weights) as moments, torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    handle.remove()
    assert set(moments) == set(weights) and len(calls) == 2
    count = module.gate_up_proj.shape[0]
    seen: list[list[Tensor]] = [[] for _ in range(count)]
    for x, index, *_ in calls:
        for token, chosen in zip(x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1]), strict=True):
            for e in chosen.tolist():
                seen[e].append(token)
    up, down = moments[f"{module_name}.gate_up_proj"], moments[f"{module_name}.down_proj"]
    assert isinstance(up, list) and isinstance(down, list)
    for e in range(count):
        assert up[e].tokens == down[e].tokens == len(seen[e])
        if not seen[e]:
            continue
        x = torch.stack(seen[e])
        with torch.no_grad():
            a, b = (x @ module.gate_up_proj[e].T).chunk(2, -1)
            middle = module.act_fn(a) * b
        assert_close(up[e].stats().hessian, plain(x)[0])
        assert_close(down[e].stats().hessian, plain(middle)[0])
    assert sum(m.tokens for m in up) == ids.numel() * calls[0][1].shape[-1]


def test_an_expert_that_no_token_reached() -> None:
    moments = [Moment(5) for _ in range(3)]
    x, y = torch.randn(4, 5), torch.randn(12, 5)
    moments[0].add(x)
    moments[2].add(y)
    stats = expert_stats(moments)
    assert [s.tokens for s in stats] == [4, 0, 12]
    assert_close(stats[1].hessian, plain(torch.cat([x, y]))[0])
    assert_close(stats[1].absmean, plain(torch.cat([x, y]))[1])
    assert_close(stats[2].hessian, plain(y)[0])
    for none in expert_stats([Moment(5), Moment(5)]):
        assert torch.equal(none.hessian, torch.eye(5)) and none.tokens == 0


def test_experts_of_another_formula(families: Any, ids: Tensor) -> None:
    """Their inputs are computed here by a formula; where it is not theirs, that is said."""
    model = families["mixtral"]()
    weights = {n: w for n, w in quantizable(model).items() if w.kind == "experts"}
    module = model.get_submodule(next(iter(weights.values())).module_name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.1
    with pytest.raises(PlanError, match="does not compute down"), collecting(model, weights), torch.no_grad():
        model(input_ids=ids)


def test_a_layer_alone_counts_every_call(families: Any, ids: Tensor) -> None:
    """Nothing is called between two of its calls, which makes them no shared input."""
    model = families["llama"]()
    name = "model.layers.0.self_attn.q_proj.weight"
    with collecting(model, {name: quantizable(model)[name]}) as moments, torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    moment = moments[name]
    assert isinstance(moment, Moment) and moment.tokens == ids.numel()
