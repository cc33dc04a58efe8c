"""How much the model's output changes with each weight: the trace of the Fisher information, row by row.

For a weight W [out, in] with inputs x_t and g_t the gradient of -log p(y) by its output, labels y of a sequence of T
tokens sampled from the model:

    rows[o] = mean over sequences of |sum_t g_{t,o} x_t|^2 / T

A change D of W then costs a KL divergence of 0.5 sum_o rows[o] (D_o H D_o^T) / tr(H) nats a token, H the mean of x x^T.
For row-wise white noise of the weight's own energy that is alpha = 0.5 sum_o rows[o] mean_i W_oi^2, exact to second
order. The sum is over a sequence's tokens before it is squared, because a change is the same at all of them and
attention adds up what its tokens have in common. At the head tokens are uncorrelated, their labels being independent,
and are squared one by one. A table of embeddings has a row for each token v and no inputs:
alpha = 0.5 mean over sequences of sum_v |sum_{t: x_t = v} g_t|^2 mean_d W_vd^2 / T.

One backward pass a sequence, streamed: hidden states are kept at every block's input (on the CPU), blocks are loaded
from last to first and run again with gradients. One block is in memory at a time, and of a gradient by a weight there
is one at a time, of one sequence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.sensitivity_file import Sensitivity
from . import stream as streaming
from .model_ends import WAY_OUT, Ends
from .plan import PlanError
from .skeleton import Skeleton
from .structure import Weight


def fisher_sensitivities(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    tokens: Tensor,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Sensitivity]:
    """{parameter: Sensitivity} for `weights` of the skeleton's model, on the skeleton's device.

    tokens: int64 [sequences, seq_len], two sequences at least (for standard errors). seed: of the labels, drawn on the
    CPU, the same on every device up to rounding of the probabilities. dtype: that the model is computed in.
    progress: called with parts done and all of them. Hidden states take blocks * tokens * hidden_size numbers of CPU
    memory.

    PlanError where gradients cannot be had one block at a time, or are not finite.
    """
    check_tokens(tokens)
    blocks = len(skeleton.blocks)
    parts = 2 * blocks + 2
    labels = torch.rand(tokens.shape, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed))
    totals = {name: _Total(name, w, len(tokens), skeleton.device) for name, w in weights.items()}
    stream = streaming.start(skeleton, tokens, dtype, batch_tokens=1)
    inputs = []
    for index in range(blocks):
        inputs.append(list(stream.hidden))
        forward_block(skeleton, stream, index, dtype)
        progress(index + 1, parts)
    with Ends(skeleton, dtype) as ends:
        measured = [t for n, t in totals.items() if skeleton.block_of(n) is None]
        for total in measured:
            total.weigh(skeleton.get(total.name))
        gradients = [
            _through_head(ends, tokens[i], stream.hidden[i], labels[i], i, measured) for i in range(len(tokens))
        ]
    progress(blocks + 1, parts)
    for index in reversed(range(blocks)):
        hidden = inputs.pop()
        names = skeleton.parameters_of(index)
        with skeleton.loaded(names):
            skeleton.cast(names, dtype)
            skeleton.blocks[index][1].requires_grad_(False)
            inside = [totals[n] for n in names if n in totals]
            for total in inside:
                total.weigh(skeleton.get(total.name))
            for i in range(len(tokens)):
                args, kwargs = stream.calls[i][index]
                x = hidden[i].to(skeleton.device).requires_grad_()
                with torch.enable_grad(), _watching(skeleton.model, inside, i):
                    out = skeleton.blocks[index][1](x, *args, **kwargs)
                    torch.autograd.backward(out[0] if isinstance(out, tuple) else out, gradients[i].to(skeleton.device))
                gradients[i] = _gradient(x).cpu()
        progress(2 * blocks + 1 - index, parts)
    with Ends(skeleton, dtype) as ends:
        for i in range(len(tokens)):
            _through_embedding(ends, tokens[i], gradients[i], i, measured)
    progress(parts, parts)
    return {name: total.result(tokens.shape[1]) for name, total in totals.items()}


def check_tokens(tokens: Tensor) -> None:
    if len(tokens) < 2:
        raise PlanError(
            f"{len(tokens)} sequence of {tokens.shape[-1]} tokens has no standard error; take 2 or more sequences "
            "(--calib-tokens)"
        )


def forward_block(skeleton: Skeleton, stream: streaming.Stream, index: int, dtype: torch.dtype) -> None:
    """All sequences through a block, loaded for it. PlanError for a block that leaves something for later ones beside
    its hidden states (keys and values that several layers share): running later blocks alone would miss it."""
    names, (name, block) = skeleton.parameters_of(index), skeleton.blocks[index]
    with skeleton.loaded(names), torch.no_grad():
        skeleton.cast(names, dtype)
        before = _leaves(stream.calls[0][index])
        stream.run(block, index, keep=True)
        if _leaves(stream.calls[0][index]) != before:
            raise PlanError(
                f"{name} ({type(block).__name__}) passes more to later blocks than hidden states, such as keys and "
                f"values that they share; {WAY_OUT}"
            )


class _Total:
    """Running sums of one weight."""

    def __init__(self, name: str, weight: Weight, sequences: int, device: torch.device) -> None:
        self.name, self.weight = name, weight
        linear = weight.kind != "embedding" or weight.head
        self.rows = torch.zeros(weight.shape[:-1] if linear else (0,), dtype=torch.float64, device=device)
        self.mean_square = self.rows  # of every row of the weight, once it is loaded
        self.by_sequence = torch.zeros(sequences, dtype=torch.float64)
        self.embedding_by_sequence = torch.zeros(sequences, dtype=torch.float64)
        self.called = False

    def weigh(self, parameter: Tensor) -> None:
        if self.rows.numel():
            self.mean_square = row_energy(parameter, self.weight)

    def add(self, gradient: Tensor, x: Tensor, sequence: int, expert: int | None = None) -> None:
        """gradient: [..., out], by the output. x: [..., in], the inputs."""
        g, x = _at_least_float32(gradient.flatten(0, -2)), _at_least_float32(x.flatten(0, -2))
        squares = x.square().sum(-1) @ g.square() if self.weight.head else (g.T @ x).square().sum(-1)
        part = squares.double()
        at = ... if expert is None else expert
        self.rows[at] += part
        self.by_sequence[sequence] += 0.5 * float(part @ self.mean_square[at])

    def result(self, seq_len: int) -> Sensitivity:
        alpha, se = mean_and_error(self.by_sequence / seq_len)
        embedding, embedding_se = mean_and_error(self.embedding_by_sequence / seq_len)
        if not math.isfinite(alpha + embedding):
            raise PlanError(
                f"{self.name}: its sensitivity is {alpha + embedding}: gradients overflow; compute in float32 (--dtype)"
            )
        if not self.called and not _one_of_experts(self.name):
            raise PlanError(f"{self.name}: its layer is never called, so what it costs is not known; --keep it")
        rows = (self.rows / (len(self.by_sequence) * seq_len)).float().cpu()
        if self.weight.kind == "embedding" and not self.weight.head:
            return Sensitivity(embedding, embedding_se, rows)
        return Sensitivity(alpha, se, rows, embedding, embedding_se)


def row_energy(parameter: Tensor, weight: Weight) -> Tensor:
    """float64 [out] or [experts, out]: mean over inputs of the squares of a weight as the model holds it."""
    return parameter.double().square().mean(0 if weight.kind == "conv1d" else -1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of float64 [sequences]."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _through_head(
    ends: Ends, tokens: Tensor, hidden: Tensor, uniform: Tensor, sequence: int, totals: Sequence[_Total]
) -> Tensor:
    """The gradient at the last block's output, [1, seq_len, hidden_size] on the CPU, of -log p of sampled labels."""
    device = ends.skeleton.device
    hidden, ids = hidden.to(device).requires_grad_(), tokens[None].to(device)
    heads = [t for t in totals if t.weight.head]
    parts = []
    with torch.enable_grad(), _watching(ends.model, [t for t in totals if not t.weight.head], sequence):
        if sequence == 0:
            with _embedded(ends):
                ends.first_hidden(ids)
        with _embedded(ends) as leaves:
            for logits in ends.logits(ids, hidden):
                residual = torch.softmax(_at_least_float32(logits.value.detach()), -1)
                label = sample(residual, uniform[logits.rows]).to(device)
                residual[torch.arange(len(label), device=device), label] -= 1  # gradient of -log p by the logits
                by_output, by_input = logits.backward(residual)
                for total in heads:
                    total.called = True
                    total.add(by_output, logits.inputs, sequence)
                parts.append(by_input)
        torch.autograd.backward(logits.all_inputs, torch.cat(parts)[None])
    if any(leaf.grad is not None for leaf in leaves):
        raise PlanError(
            f"{type(ends.model).__name__}: its output depends on the embeddings in ways around its blocks; {WAY_OUT}"
        )
    return _gradient(hidden).cpu()


def _through_embedding(ends: Ends, tokens: Tensor, gradient: Tensor, sequence: int, totals: Sequence[_Total]) -> None:
    """From the gradient at the first block's input to what stands before it: embeddings, and projections of them."""
    device = ends.skeleton.device
    inside = [t for t in totals if not t.weight.head]
    with torch.enable_grad(), _watching(ends.model, inside, sequence), _embedded(ends) as leaves:
        torch.autograd.backward(ends.first_hidden(tokens[None].to(device)), gradient.to(device))
    for total in totals:
        if total.weight.embedding:
            total.called = True
            for leaf in leaves:
                ids, index = tokens.to(device).unique(return_inverse=True)
                width = leaf.shape[-1]
                by_id = torch.zeros(len(ids), width, dtype=torch.float64, device=device)
                by_id.index_add_(0, index, _gradient(leaf).double().reshape(-1, width))
                # what the module gives, not its table: some scale it
                energy = torch.zeros(len(ids), dtype=torch.float64, device=device)
                energy[index] = leaf.detach().double().square().mean(-1).flatten()
                total.embedding_by_sequence[sequence] += 0.5 * float(by_id.square().sum(-1) @ energy)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """int64 [tokens] on the CPU: labels from float [tokens, vocabulary] by inversion of the cumulated sums at `uniform`
    in [0, 1), float64 [tokens]: small differences of probabilities change few labels."""
    cumulated = probabilities.cpu().cumsum(-1, dtype=torch.float64)
    label = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return label.clamp_(max=probabilities.shape[-1] - 1)


@contextlib.contextmanager
def _embedded(ends: Ends) -> Iterator[list[Tensor]]:
    """While it lasts, gradients start at the embeddings: [output of the embedding module, call by call]."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = ends.embedding.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextlib.contextmanager
def _watching(model: nn.Module, totals: Sequence[_Total], sequence: int) -> Iterator[None]:
    """While it lasts, what is called and then run backwards adds to the totals, as part of that sequence."""
    handles = []
    experts: dict[str, list[_Total]] = {}
    for total in totals:
        if total.weight.kind == "experts":
            experts.setdefault(total.weight.module_name, []).append(total)
        elif total.weight.kind in ("linear", "conv1d"):
            module = model.get_submodule(total.weight.module_name)
            handles.append(module.register_forward_hook(_linear_hook(total, sequence), with_kwargs=True))
    for name, stacked in experts.items():
        hook = _experts_hook(name, {t.name.rpartition(".")[2]: t for t in stacked}, sequence)
        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(total: _Total, sequence: int) -> Any:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        _watch(total, x, output, sequence)

    return after


def _watch(total: _Total, x: Tensor, output: Tensor, sequence: int, expert: int | None = None) -> None:
    total.called = True
    if output.requires_grad:
        inputs = x.detach()
        output.register_hook(lambda gradient: total.add(gradient, inputs, sequence, expert))


def _experts_hook(module_name: str, totals: Mapping[str, _Total], sequence: int) -> Any:
    """Stacked experts compute all of them inside one module: its output is computed again by their own formula, expert
    by expert, checked, and put in its place, so that gradients pass through what can be watched."""

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, index, gate = [*args, *kwargs.values()][:3]
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        index, gate = index.reshape(len(x), -1), gate.reshape(len(x), -1)
        out = torch.zeros_like(x)
        for e in range(module.gate_up_proj.shape[0]):
            token, slot = torch.where(index == e)
            if not len(token):
                continue
            routed = x[token]
            both = nn.functional.linear(routed, module.gate_up_proj[e])
            a, b = both.chunk(2, -1)
            middle = module.act_fn(a) * b
            down = nn.functional.linear(middle, module.down_proj[e])
            for name, given, made in (("gate_up_proj", routed, both), ("down_proj", middle, down)):
                if name in totals:
                    _watch(totals[name], given, made, sequence, e)
            out = out.index_add(0, token, (down * gate[token, slot, None]).to(out.dtype))
        difference = float((out - output.reshape(out.shape)).detach().norm())
        if not difference <= 0.02 * float(output.detach().norm()) + 1e-6:
            raise PlanError(
                f"{module_name} ({type(module).__name__}) does not compute down(act(gate) * up), so what its experts "
                "cost is not known; --keep '*.experts'"
            )
        return out.reshape(shape)

    return after


def _one_of_experts(name: str) -> bool:
    """Whether a weight belongs to an expert of a list: no token may have been sent to it."""
    return "experts" in name.split(".")


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise PlanError(f"no gradient reaches a hidden state {list(leaf.shape)} of the model; {WAY_OUT}")
    return leaf.grad


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _leaves(value: Any) -> Any:
    """What containers hold, by identity."""
    if isinstance(value, Mapping):
        return {key: _leaves(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaves(item) for item in value]
    return id(value)
