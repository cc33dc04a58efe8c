"""The Fisher diagonal of every linear layer: how much each single weight matters to the model's output.

E[(d log p(y) / d w)^2] over calibration tokens, with the labels y sampled from the model itself, so that it is the
Fisher information and not the gradient of some text. A token's gradient by W is the outer product of its gradient g by
W x and x, and gradients of different tokens are uncorrelated in expectation, so the sum over tokens is
(g^2)^T (x^2): one more matrix product beside the backward pass, and no gradient of a weight is ever made.

The whole model is in memory, float32, and so is the result, each part where its layer is: 8 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .plan import PlanError
from .structure import Weight


def fisher_diagonal(
    model: Any,
    weights: dict[str, Weight],
    tokens: Tensor,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Tensor]:
    """{parameter: float32 [out, in]} where the model is, means over the tokens int64 [sequences, seq_len]. One backward
    a sequence. Labels are drawn on the CPU: the same on every device, up to rounding of the probabilities.

    weights: those wanted, linear layers (nn.Linear, Conv1D) of `model`. PlanError for stacked experts.
    """
    for name, weight in weights.items():
        if weight.kind not in ("linear", "conv1d"):
            raise PlanError(f"{name}: stacked experts have no Fisher diagonal here; --keep them, or another solver")
    sums = {n: torch.zeros(w.shape[-2:], device=model.get_parameter(n).device) for n, w in weights.items()}
    inputs: dict[str, Tensor] = {}
    handles = [h for name, w in weights.items() for h in _hooks(model.get_submodule(w.module_name), name, inputs, sums)]
    generator = torch.Generator("cpu").manual_seed(seed)
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()
    device = embedded.weight.device
    try:
        for i, sequence in enumerate(tokens.to(device)):
            x = embedded(sequence[None]).requires_grad_()  # so that gradients flow though no parameter takes any
            with torch.enable_grad(), _instead(embedded, x):
                logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
                log_p = torch.log_softmax(logits, -1)
            label = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(logits.device)
            (-log_p.gather(1, label).sum()).backward()
            progress(i + 1, len(tokens))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}


def _hooks(module: nn.Module, name: str, inputs: dict[str, Tensor], sums: dict[str, Tensor]) -> Iterable[Any]:
    def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = args[0].detach()

    def backward(_: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        g, x = grad_output[0].flatten(0, -2).float(), inputs.pop(name).flatten(0, -2).float()
        sums[name].addmm_(g.square().T, x.square())

    return module.register_forward_hook(forward), module.register_full_backward_hook(backward)


class _instead:
    """While it lasts, `module` gives `value`."""

    def __init__(self, module: nn.Module, value: Tensor) -> None:
        self.handle = module.register_forward_hook(lambda *_: value)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
