"""How much the model's output changes with each weight, forwards only: noise is added, KL divergence measured.

For models too large for gradients (calibrate/sensitivity.py takes a block's activations with their graph), and to check
those. Row-wise Gaussian noise of relative energy t^2 in one weight at a time costs KL = alpha t^2 while the output is
still of second order in it; alpha = KL / t^2 includes what correlations between tokens do, which the Fisher trace by
rows leaves out. How rows share alpha is not measured: `rows` is constant over them.

Cost: hidden states of the original are kept at every block's input, and a changed weight runs only through the blocks
behind it, half of the model on average, and the head. With n weights of L blocks that is n L / 2 block forwards and n
head forwards. Weights are taken in groups whose hidden states fit in `carry_bytes`, and blocks are loaded once a group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.sensitivity_file import Sensitivity
from . import stream as streaming
from .model_ends import Ends
from .plan import PlanError
from .sensitivity import check_tokens, forward_block, mean_and_error, row_energy
from .skeleton import Skeleton
from .structure import Weight

ENERGY = 0.01
"""Relative energy of the noise: about what 4 bits leave."""

CARRY_BYTES = 4 << 30


@dataclass(frozen=True)
class _Change:
    """Noise in one weight; `part` is its block, -1 for embeddings, the number of blocks for the head."""

    name: str
    weight: Weight
    part: int

    def noisy(self, parameter: Tensor, energy: float, seed: int) -> Tensor:
        return with_noise(parameter, self.weight, energy, seed ^ zlib.crc32(f"{self.name}/{self.part}".encode()))


def with_noise(parameter: Tensor, weight: Weight, energy: float, seed: int) -> Tensor:
    """The parameter of a weight, as the model holds it, with Gaussian noise of `energy` times each row's energy. Drawn
    on the CPU: the same on every device."""
    deviation = (energy * row_energy(parameter, weight)).sqrt()
    deviation = deviation[None] if weight.kind == "conv1d" else deviation[..., None]
    noise = torch.randn(parameter.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(parameter.device)
    return (parameter.double() + noise * deviation).to(parameter.dtype)


def noise_sensitivities(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    tokens: Tensor,
    *,
    seed: int,
    energy: float = ENERGY,
    dtype: torch.dtype = torch.float32,
    carry_bytes: int = CARRY_BYTES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Sensitivity]:
    """{parameter: Sensitivity} for `weights` of the skeleton's model, on the skeleton's device.

    tokens: int64 [sequences, seq_len], two sequences at least. energy: t^2 of the noise, of which there is one draw a
    weight: standard errors are over the sequences and do not contain its share, which is small for a matrix of many
    elements. dtype: that the model is computed in; noise is added in it. carry_bytes: of hidden states of changed
    models, on the CPU, beside those of the original (blocks * tokens * hidden_size numbers). progress: called with
    weights done and all of them.

    PlanError where blocks cannot be run one at a time, or for a linear layer outside the blocks that is not the head.
    """
    check_tokens(tokens)
    blocks = len(skeleton.blocks)
    changes = sorted(_changes(skeleton, weights), key=lambda c: c.part)
    stream = streaming.start(skeleton, tokens, dtype, batch_tokens=1)
    inputs = []
    for index in range(blocks):
        inputs.append(list(stream.hidden))
        forward_block(skeleton, stream, index, dtype)
    inputs.append(list(stream.hidden))
    size = sum(h.nbytes for h in inputs[0])
    group = max(1, carry_bytes // size)
    kl: dict[_Change, Tensor] = {}
    shares: dict[str, Tensor] = {}
    for first in range(0, len(changes), group):
        _measure(skeleton, stream, inputs, tokens, changes[first : first + group], (energy, seed, dtype), kl, shares)
        progress(len(kl), len(changes))
    return {name: _result(name, weight, kl, shares, energy, blocks) for name, weight in weights.items()}


def _changes(skeleton: Skeleton, weights: Mapping[str, Weight]) -> list[_Change]:
    found = []
    for name, weight in weights.items():
        block = skeleton.block_of(name)
        if block is not None:
            found.append(_Change(name, weight, block))
        if weight.embedding:
            found.append(_Change(name, weight, -1))
        if weight.head:
            found.append(_Change(name, weight, len(skeleton.blocks)))
        if block is None and not weight.embedding and not weight.head:
            raise PlanError(f"{name}: is outside the blocks and not the head, where noise is not measured; --keep it")
    return found


@torch.no_grad()
def _measure(
    skeleton: Skeleton,
    stream: streaming.Stream,
    inputs: list[list[Tensor]],
    tokens: Tensor,
    group: list[_Change],
    settings: tuple[float, int, torch.dtype],
    kl: dict[_Change, Tensor],
    shares: dict[str, Tensor],
) -> None:
    """Adds to `kl` of each change of the group float64 [sequences], nats a token; to `shares` mean squares by rows."""
    energy, seed, dtype = settings
    blocks = len(skeleton.blocks)
    carried: dict[_Change, list[Tensor]] = {}
    table = [c for c in group if c.part < 0]
    if table:
        with Ends(skeleton, dtype) as ends:
            for change in table:
                skeleton.put(change.name, change.noisy(skeleton.get(change.name), energy, seed))
                carried[change] = [ends.first_hidden(row[None].to(skeleton.device)).cpu() for row in tokens]
    for index in range(max(0, group[0].part), blocks):
        names, block = skeleton.parameters_of(index), skeleton.blocks[index][1]
        with skeleton.loaded(names):
            skeleton.cast(names, dtype)
            for change, hidden in carried.items():
                carried[change] = _through(stream, index, block, hidden)
            for change in [c for c in group if c.part == index]:
                original = skeleton.get(change.name)
                shares[change.name] = row_energy(original, change.weight)
                skeleton.put(change.name, change.noisy(original, energy, seed))
                carried[change] = _through(stream, index, block, inputs[index])
                skeleton.put(change.name, original)
    with Ends(skeleton, dtype) as ends:
        for change in group:
            kl[change] = torch.zeros(len(tokens), dtype=torch.float64)
        head = f"{ends.head_name}.weight"
        original = skeleton.get(head)
        for i, row in enumerate(tokens):
            ids = row[None].to(skeleton.device)
            reference = [
                torch.log_softmax(c.value.float(), -1) for c in ends.logits(ids, _there(inputs[-1][i], skeleton))
            ]
            for change in group:
                last = carried[change][i] if change in carried else inputs[-1][i]
                if change.part == blocks:
                    shares[change.name] = row_energy(original, change.weight)
                    skeleton.put(head, change.noisy(original, energy, seed))
                for log_p, chunk in zip(reference, ends.logits(ids, _there(last, skeleton)), strict=True):
                    log_q = torch.log_softmax(chunk.value.float(), -1)
                    kl[change][i] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)) / len(row)
                if change.part == blocks:
                    skeleton.put(head, original)


def _through(stream: streaming.Stream, index: int, block: torch.nn.Module, hidden: list[Tensor]) -> list[Tensor]:
    moved = streaming.Stream(list(hidden), stream.calls, stream.device)
    moved.run(block, index, keep=True)
    return moved.hidden


def _there(hidden: Tensor, skeleton: Skeleton) -> Tensor:
    return hidden.to(skeleton.device)


def _result(
    name: str,
    weight: Weight,
    kl: Mapping[_Change, Tensor],
    shares: Mapping[str, Tensor],
    energy: float,
    blocks: int,
) -> Sensitivity:
    values = {change.part: kl[change] / energy for change in kl if change.name == name}
    for part, measured in values.items():
        if not bool(measured.isfinite().all()):
            raise PlanError(f"{name}: noise makes the output {measured.tolist()[0]} (part {part}); compute in float32")
    table = mean_and_error(values.pop(-1).clamp_min(0)) if weight.embedding else (0.0, 0.0)
    if not values:
        return Sensitivity(*table, torch.zeros(0))
    (measured,) = values.values()
    alpha, se = mean_and_error(measured.clamp_min(0))  # rounding alone can make a KL of nearly nothing negative
    share = shares[name]
    rows = torch.full(share.shape, 2 * alpha / max(float(share.sum()), torch.finfo(torch.float32).tiny))
    return Sensitivity(alpha, se, rows, *table)
