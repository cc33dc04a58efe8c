"""Sensitivities against the gradients of single tokens in the whole model, and against the KL divergence of noise."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.calibrate import model_ends
from bitpalette.calibrate.noise_sensitivity import noise_sensitivities, with_noise
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.sensitivity import fisher_sensitivities, sample
from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.calibrate.structure import Weight, quantizable
from bitpalette.calibrate.whole import load_model
from bitpalette.formats.base import open_source

TOKENS = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(7))
TOKENS[:, 4] = TOKENS[:, 0]  # a token twice: its embedding's changes add up
SEED = 5


def opened(path: Path) -> tuple[Skeleton, dict[str, Weight]]:
    skeleton = Skeleton(open_source(path))
    return skeleton, {n: w for n, w in quantizable(skeleton.model).items() if n not in skeleton.tied}


def own_weights(name: str, weight: Weight, leaves: dict[str, list[Tensor]]) -> Any:
    """A hook under which every token has its own copy of the weight, so that autograd gives gradients by token."""

    def copies(parameter: Tensor, key: str, count: int) -> Tensor:
        leaf = parameter.detach().expand(count, *parameter.shape).clone().requires_grad_()
        leaves.setdefault(key, []).append(leaf)
        return leaf

    def linear(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1])
        w = copies(module.weight, name, len(x))
        y = torch.einsum("tio,ti->to" if weight.kind == "conv1d" else "toi,ti->to", w, x)
        return (y if module.bias is None else y + module.bias).reshape(output.shape)

    def experts(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, index, gate = args
        stem = weight.module_name
        up = copies(module.gate_up_proj, f"{stem}.gate_up_proj", len(x))
        down = copies(module.down_proj, f"{stem}.down_proj", len(x))
        out = []
        for t in range(len(x)):
            ways = []
            for e, share in zip(index[t].tolist(), gate[t], strict=True):
                a, b = (up[t, e] @ x[t]).chunk(2)
                ways.append(share * (down[t, e] @ (module.act_fn(a) * b)))
            out.append(torch.stack(ways).sum(0))
        return torch.stack(out)

    def embedding(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        leaves.setdefault(f"{name}/embedding", []).append(leaf)
        return leaf

    return {"linear": linear, "conv1d": linear, "experts": experts, "embedding": embedding}[weight.kind]


def whole_model(path: Path, weights: dict[str, Weight]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{parameter: (rows, alpha of each sequence, embedding_alpha of each)} by float64 autograd."""
    model: Any = load_model(open_source(path), torch.float64)
    model.config._experts_implementation = "eager"  # torch's grouped product takes no float64
    uniform = torch.rand(TOKENS.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    count, length = TOKENS.shape
    out = {n: (torch.zeros(w.shape[:-1]).double(), torch.zeros(count), torch.zeros(count)) for n, w in weights.items()}
    for i, sequence in enumerate(TOKENS):
        leaves: dict[str, list[Tensor]] = {}
        hooks: dict[nn.Module, Any] = {}
        for name, weight in weights.items():
            module = model.get_submodule(weight.module_name)
            hooks[module] = own_weights(name, weight, leaves)
            if weight.head:
                head = Weight("linear", "", weight.shape)
                hooks[model.get_output_embeddings()] = own_weights(name, head, leaves)
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        log_p = torch.log_softmax(model(input_ids=sequence[None], use_cache=False).logits[0], -1)
        label = sample(log_p.detach().exp(), uniform[i])
        (-log_p.gather(1, label[:, None]).sum()).backward()
        for handle in handles:
            handle.remove()
        for key, (leaf,) in leaves.items():
            assert leaf.grad is not None
            name, _, table = key.partition("/")
            if table:
                for v in sequence.unique():
                    at = sequence == v
                    energy = leaf.detach()[0, at][0].square().mean()
                    out[name][2][i] += 0.5 * leaf.grad[0, at].sum(0).square().sum() * energy / length
                continue
            axis = 0 if weights[name].kind == "conv1d" else -1
            square = leaf.grad.square().sum(0) if weights[name].head else leaf.grad.sum(0).square()
            by_row = square.sum(axis)
            energy = model.get_parameter(name).square().mean(axis)
            out[name][0].add_(by_row / TOKENS.numel())
            out[name][1][i] = 0.5 * (by_row * energy).sum() / length
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "falcon", "qwen3_moe"])
def test_gradients_of_the_whole_model(checkpoint: Callable[..., Path], name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(model_ends, "CHUNK_LOGITS", 4 * 203)  # heads in three steps
    path = checkpoint(name)
    skeleton, weights = opened(path)
    seen: list[tuple[int, int]] = []
    got = fisher_sensitivities(skeleton, weights, TOKENS, seed=SEED, progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in skeleton.model.modules())
    want = whole_model(path, weights)
    assert list(got) == list(want)
    for parameter, (rows, alpha, table) in want.items():
        one, weight = got[parameter], weights[parameter]
        mean, spread = alpha.mean(), alpha.std() / len(TOKENS) ** 0.5
        table_mean, table_spread = table.mean(), table.std() / len(TOKENS) ** 0.5
        if weight.embedding and not weight.head:
            found = [one.alpha, one.alpha_se, 0.0]
            wanted = [table_mean, table_spread, 0.0]
            assert one.rows.shape == (0,)
        else:
            found = [one.alpha, one.alpha_se, one.embedding_alpha, one.embedding_alpha_se]
            wanted = [mean, spread, table_mean, table_spread]
            assert one.rows.dtype == torch.float32 and one.rows.shape == rows.shape
            assert ((one.rows - rows).abs() <= 1e-4 * rows + 1e-7 * rows.max()).all(), parameter
        assert wanted[0] > 0
        for a, b in zip(found, wanted, strict=True):
            assert abs(a - float(b)) <= 1e-4 * float(wanted[0]), parameter


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_noise(checkpoint: Callable[..., Path], name: str) -> None:
    """KL of noise added to the whole model by hand; the same whatever is carried at once."""
    skeleton, weights = opened(checkpoint(name))
    chosen = {n: w for n, w in weights.items() if skeleton.block_of(n) in (1, None)}
    seed, energy = 1, 1e-3
    one = noise_sensitivities(skeleton, chosen, TOKENS, seed=seed, energy=energy)
    other = noise_sensitivities(skeleton, chosen, TOKENS, seed=seed, energy=energy, carry_bytes=1)
    assert all(p.is_meta for p in skeleton.model.parameters())
    model: Any = load_model(skeleton.source)
    log_p = torch.log_softmax(model(input_ids=TOKENS, use_cache=False).logits, -1)
    for parameter, s in one.items():
        assert s.alpha == other[parameter].alpha > 0 and s.embedding_alpha == other[parameter].embedding_alpha
        weight = weights[parameter]
        before = model.get_parameter(parameter).detach().clone()
        if s.rows.numel():
            mean_square = before.square().mean(0 if weight.kind == "conv1d" else -1)
            assert abs(0.5 * float((s.rows * mean_square).sum()) - s.alpha) <= 1e-4 * s.alpha
        if weight.head and weight.embedding:
            continue  # one tensor in the whole model
        part = skeleton.block_of(parameter)
        part = part if part is not None else -1 if weight.embedding else len(skeleton.blocks)
        draw = seed ^ zlib.crc32(f"{parameter}/{part}".encode())
        model.get_parameter(parameter).data.copy_(with_noise(before, weight, energy, draw))
        log_q = torch.log_softmax(model(input_ids=TOKENS, use_cache=False).logits, -1)
        model.get_parameter(parameter).data.copy_(before)
        by_sequence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1) / energy
        assert abs(float(by_sequence.mean()) - s.alpha) <= 0.01 * s.alpha, parameter
        assert abs(float(by_sequence.std()) / 3**0.5 - s.alpha_se) <= 0.01 * s.alpha, parameter


def test_one_sequence_has_no_error(checkpoint: Callable[..., Path]) -> None:
    skeleton, weights = opened(checkpoint("llama"))
    with pytest.raises(PlanError, match="1 sequence of 11 tokens"):
        fisher_sensitivities(skeleton, weights, TOKENS[:1], seed=SEED)


def test_keys_and_values_that_layers_share_are_refused(checkpoint: Callable[..., Path]) -> None:
    skeleton, weights = opened(checkpoint("llama"))
    shared: dict[str, Tensor] = {}
    block = skeleton.blocks[0][1]
    forward = skeleton.model.model.forward
    skeleton.model.model.forward = lambda **given: forward(**given, shared=shared)
    handle = block.register_forward_hook(lambda module, args, kwargs, out: shared.update(k=out), with_kwargs=True)
    with pytest.raises(PlanError, match=r"layers\.0 .* share; use --uniform"):
        fisher_sensitivities(skeleton, weights, TOKENS, seed=SEED)
    handle.remove()


def test_labels() -> None:
    p = torch.tensor([[0.25, 0.0, 0.75], [0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    uniform = torch.tensor([0.2, 0.25, 0.0, 1.0 - 1e-16], dtype=torch.float64)
    assert sample(p, uniform).tolist()[:3] == [0, 2, 1]
