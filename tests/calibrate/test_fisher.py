"""The Fisher diagonal against gradients of single tokens."""

from __future__ import annotations

import torch

from bitpalette.calibrate.fisher import fisher_diagonal
from bitpalette.calibrate.structure import quantizable


def model_of() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def test_single_tokens() -> None:
    """Sequences of one token: the square of autograd's own gradient, label by label."""
    model = model_of()
    weights = {n: w for n, w in quantizable(model).items() if "layers" in n and "o_proj" not in n}
    tokens = torch.randint(0, 40, (6, 1), generator=torch.Generator().manual_seed(1))
    got = fisher_diagonal(model, weights, tokens, seed=5)
    generator = torch.Generator().manual_seed(5)
    model.requires_grad_(True)
    want = {n: torch.zeros(w.shape) for n, w in weights.items()}
    for sequence in tokens:
        log_p = torch.log_softmax(model(input_ids=sequence[None]).logits[0].float(), -1)
        label = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        model.zero_grad()
        log_p.gather(1, label).sum().backward()
        for name in want:
            want[name] += model.get_parameter(name).grad.square() / len(tokens)
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-9), name
    assert float(want["model.layers.1.mlp.down_proj.weight"].sum()) > 0


def test_longer_sequences_and_nothing_left_behind() -> None:
    model = model_of()
    weights = {n: w for n, w in quantizable(model).items() if "down_proj" in n}
    tokens = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[int, int]] = []
    a = fisher_diagonal(model, weights, tokens, 1, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(bool((f > 0).all()) and f.shape == weights[n].shape for n, f in a.items())
    assert all(torch.equal(a[n], f) for n, f in fisher_diagonal(model, weights, tokens, 1).items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
