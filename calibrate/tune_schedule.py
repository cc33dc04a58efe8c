"""How to tune: what a caller may set, and what is done in which step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from .plan import PlanError
from .skeleton import DTYPES


@dataclass(frozen=True)
class TuneSettings:
    """How to tune.

    steps: of Adam, at most; their rates fall from `scale_rate` (multipliers of rows) and `norm_rate` (relative changes
    of gains) to 0 along a cosine; a rate of 0 leaves these as they are. step_tokens: of one step, at least one
    sequence. seconds: time box for everything, None without; the number of steps is planned to fit in. held_out: share
    of the sequences that decide, the last ones; at least 2 and at most `held_out_tokens` tokens. patience: evaluations
    (8 in all) without a better one before it stops. dtype: quantized weights are held in; products are in float32.
    """

    steps: int = 128
    scale_rate: float = 2e-3
    norm_rate: float = 2e-3
    step_tokens: int = 512
    seconds: float | None = None
    held_out: float = 0.1
    held_out_tokens: int = 4096
    patience: int = 3
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "dtype" and value is not None and not value >= 0:
                raise PlanError(f"tuning: {f.name} is at least 0; got {value!r}")
        if not 0 < self.held_out < 1:
            raise PlanError(f"tuning: held_out is a share between 0 and 1; got {self.held_out!r}")
        if self.dtype not in DTYPES:
            raise PlanError(f"tuning: dtype is one of {list(DTYPES)}; got {self.dtype!r}")


def learning_rate(bits: float) -> float:
    """A rate for weights of that many bits on average: errors halve with every bit, and so do the changes that make up
    for them.

    Measured at 2.25 bits (int, 40 steps, KL on other text 1.153 before): .815 by 2e-3, .751 by 4e-3, .729 by 1e-2, of
    which the last was restless on the way; .853 by scales alone and .983 by norms alone at 2e-3.
    """
    return 4e-3 * 2.0 ** (2.0 - max(bits, 2.0))


@dataclass(frozen=True)
class Schedule:
    """What is done, once it is decided. every: steps between evaluations. order: sequences of each step. held_out:
    sequences that are."""

    steps: int
    every: int
    order: list[list[int]]
    held_out: list[int]

    @property
    def sequences(self) -> list[int]:
        """All that are looked at, ascending."""
        return sorted({i for step in self.order for i in step} | set(self.held_out))

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))


def schedule(sequences: int, seq_len: int, settings: TuneSettings, steps: int) -> Schedule:
    """For so many steps. Passes over the text are each in an order of their own, drawn from the seed."""
    held_out = held_out_of(sequences, seq_len, settings)
    training = sequences - len(held_out)
    batch = max(1, settings.step_tokens // seq_len)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(training, generator=generator).tolist()
    by_step = [order[i * batch : (i + 1) * batch] for i in range(steps)]
    return Schedule(steps, -(-steps // evaluations(steps)), by_step, held_out)


def held_out_of(sequences: int, seq_len: int, settings: TuneSettings) -> list[int]:
    """The last of the sequences."""
    count = min(round(settings.held_out * sequences), settings.held_out_tokens // seq_len)
    return list(range(sequences - max(2, count), sequences))


def evaluations(steps: int) -> int:
    """How often the held-out text is looked at, the beginning not counted: an evaluation costs some steps."""
    return max(1, min(8, steps // 4))
