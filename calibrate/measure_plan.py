"""True KL divergences of several plans in one pass through the model, a block of it in memory at a time.

The original's hidden states and those of every plan go through each block together: the original as it is, a plan with
its parameters in other forms (a scheme, say, or as they were written). A form that plans share is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import stream as streaming
from .collect_stats import head_module
from .plan import PlanError
from .skeleton import Skeleton
from .stream import Stream
from .structure import Weight

ROWS = 256
"""Positions whose logits are in memory at a time: 50 MB for a vocabulary of 49 152."""

Form = Hashable
Rounded = Callable[[str, Tensor, Any], Tensor]
"""(parameter, its value in the checkpoint's layout, form) -> what takes its place, in the same layout."""


@dataclass(frozen=True)
class Measurement:
    """kl: nats a token, with its standard error over sequences. kls: of every sequence, for paired differences."""

    kl: float
    standard_error: float
    perplexity: float
    reference_perplexity: float
    top1: float
    kls: tuple[float, ...]


def measure_plans(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    tokens: Tensor,
    plans: Sequence[Mapping[str, Form]],
    rounded: Callable[[int | None], Rounded],
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Measurement]:
    """tokens: int64 [sequences, seq_len]. plans: {parameter: form}, others as they are. rounded: for a block (None:
    what stands outside) what makes its forms. PlanError for models that do not run block by block."""
    replaced = _outer(skeleton, plans, rounded(None))
    original = streaming.start(skeleton, tokens, dtype)
    tables = {n for n, w in weights.items() if w.embedding}
    streams = []
    for other in replaced:
        if tables.intersection(other):
            streams.append(streaming.start(skeleton, tokens, dtype, replaced=other))
        else:
            streams.append(Stream(list(original.hidden), original.calls, original.device))
    blocks = len(skeleton.blocks)
    for index in range(blocks):
        _advance(skeleton, index, original, streams, plans, rounded(index), dtype)
        progress(index + 1, blocks + 1)
    found = _compare(skeleton, tokens, original, streams, replaced, dtype)
    progress(blocks + 1, blocks + 1)
    return found


def _outer(skeleton: Skeleton, plans: Sequence[Mapping[str, Form]], rounded: Rounded) -> list[dict[str, Tensor]]:
    """For each plan, what takes the place of parameters outside the blocks."""
    found: list[dict[str, Tensor]] = [{} for _ in plans]
    names = skeleton.parameters_of(None)
    for name in names:
        forms = dict.fromkeys(plan[name] for plan in plans if name in plan)
        if not forms:
            continue
        with skeleton.loaded(names if skeleton.fold is not None else [name]) as originals:
            w = originals[name]
        made = {form: rounded(name, w, form) for form in forms}
        for plan, other in zip(plans, found, strict=True):
            if name in plan:
                other[name] = made[plan[name]]
    return found


@torch.no_grad()
def _advance(
    skeleton: Skeleton,
    index: int,
    original: Stream,
    streams: Sequence[Stream],
    plans: Sequence[Mapping[str, Form]],
    rounded: Rounded,
    dtype: torch.dtype,
) -> None:
    names = skeleton.parameters_of(index)
    block = skeleton.blocks[index][1]
    with skeleton.loaded(names) as originals:
        skeleton.cast(names, dtype)
        plain = {name: skeleton.get(name) for name in names}
        original.run(block, index, keep=True)
        known: dict[tuple[str, Form], Tensor] = {}
        for plan, stream in zip(plans, streams, strict=True):
            for name in names:
                if name not in plan:
                    skeleton.put(name, plain[name])
                    continue
                form = plan[name]
                if (name, form) not in known:
                    value = rounded(name, originals[name], form)
                    known[name, form] = value.to(dtype) if value.is_floating_point() else value
                skeleton.put(name, known[name, form])
            stream.run(block, index, keep=True)


@torch.no_grad()
def _compare(
    skeleton: Skeleton,
    tokens: Tensor,
    original: Stream,
    streams: Sequence[Stream],
    replaced: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> list[Measurement]:
    head_name = head_module(skeleton.model)
    inputs = [
        torch.cat(
            [
                x.reshape(-1, tokens.shape[1], x.shape[-1])
                for x in streaming.head_inputs(skeleton, tokens, stream, head_name, dtype, replaced=other)
            ]
        )
        for stream, other in zip((original, *streams), ({}, *replaced), strict=True)
    ]
    if any(len(x) != len(tokens) for x in inputs):
        raise PlanError(
            f"{type(skeleton.model).__name__} gives {len(inputs[0])} of {len(tokens)} sequences to its head; its plans "
            "cannot be compared; use --refine 0"
        )
    module = skeleton.model.get_submodule(head_name)
    parameter = skeleton.tied.get(f"{head_name}.weight", f"{head_name}.weight")
    own = [parameter, *([f"{head_name}.bias"] if getattr(module, "bias", None) is not None else [])]
    part = skeleton.parameters_of(None) if skeleton.fold is not None else own
    heads = [other.get(parameter) for other in replaced]
    logits_of = _Logits(skeleton.model.config)
    totals = [_Totals() for _ in streams]
    with skeleton.loaded(part) as loaded:
        plain = loaded[parameter].to(dtype)
        bias = loaded[own[1]].to(dtype) if len(own) > 1 else None
        ours = [plain if head is None else head.to(dtype) for head in heads]
        for i, sequence in enumerate(tokens):
            for total in totals:
                total.begin()
            for a in range(0, len(sequence), ROWS):
                rows = slice(a, min(a + ROWS, len(sequence)))
                nexts = sequence[a + 1 : rows.stop + 1].to(plain.device)
                log_p = logits_of(inputs[0][i, rows], plain, bias)
                for x, head, total in zip(inputs[1:], ours, totals, strict=True):
                    total.add(log_p, logits_of(x[i, rows], head, bias), nexts)
            for total in totals:
                total.end(len(sequence))
    return [total.measurement() for total in totals]


@dataclass
class _Logits:
    """Log probabilities as the model's config says that they follow from the head's output."""

    config: object

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(x.to(weight.device), weight, bias).float()
        scaling, scale = getattr(self.config, "logits_scaling", None), getattr(self.config, "logit_scale", None)
        cap = getattr(self.config, "final_logit_softcapping", None)
        logits = logits / scaling if scaling else logits  # Granite
        logits = logits * scale if scale else logits  # Cohere
        logits = cap * torch.tanh(logits / cap) if cap else logits  # Gemma
        return torch.log_softmax(logits, -1)


class _Totals:
    def __init__(self) -> None:
        self.kls: list[float] = []
        self.kl = self.loss = self.reference = 0.0
        self.agree = self.seen = self.predicted = 0

    def begin(self) -> None:
        self.kl = 0.0

    def add(self, log_p: Tensor, log_q: Tensor, nexts: Tensor) -> None:
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64))
        self.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        n = len(nexts)
        self.loss -= float(log_q[:n].gather(1, nexts[:, None]).sum(dtype=torch.float64))
        self.reference -= float(log_p[:n].gather(1, nexts[:, None]).sum(dtype=torch.float64))
        self.seen += len(log_p)
        self.predicted += n

    def end(self, length: int) -> None:
        self.kls.append(self.kl / length)

    def measurement(self) -> Measurement:
        kls = torch.tensor(self.kls, dtype=torch.float64)
        error = float(kls.std() / len(kls) ** 0.5) if len(kls) > 1 else 0.0
        return Measurement(
            kl=float(kls.mean()),
            standard_error=error,
            perplexity=math.exp(self.loss / self.predicted),
            reference_perplexity=math.exp(self.reference / self.predicted),
            top1=self.agree / self.seen,
            kls=tuple(self.kls),
        )


def difference(a: Measurement, b: Measurement) -> tuple[float, float]:
    """(a - b in KL, its standard error): the sequences are the same, so their noise mostly cancels."""
    d = torch.tensor(a.kls, dtype=torch.float64) - torch.tensor(b.kls, dtype=torch.float64)
    return float(d.mean()), float(d.std() / len(d) ** 0.5) if len(d) > 1 else 0.0
