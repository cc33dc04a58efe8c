"""The last step of `--effort best`: codes stay; scales of rows and gains of norms move until the compiled model's
output distribution comes closest to the original's on the calibration text.

Rounding is done layer by layer; what the layers' errors do together only the whole model shows. Here its KL divergence
from the original is followed downhill by Adam, in all multipliers of rows and all gains at once: some 1e5 numbers,
changed by about a percent, at no cost when the model runs. A part of the text is held out: it says which of the states
on the way is best, when to stop, and whether anything is to be kept at all.

    tune.py             the run: steps, held-out text, going on where it was killed
    tune_schedule.py    settings, and which sequences are looked at in which step
    tune_student.py     the compiled model with multipliers, and what is stored of them
    tune_reference.py   what the original gives, block by block
    tune_loss.py        KL by chunks of positions
    tune_state.py       files to go on from
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.errors import FormatError
from ..formats.native import stored_name
from .device import wait_for
from .plan import PlanError
from .skeleton import DTYPES
from .tune_loss import Map, divergence, logit_map
from .tune_reference import head_inputs_of, original_head
from .tune_schedule import Schedule, TuneSettings, evaluations, held_out_of, learning_rate, schedule
from .tune_state import load_state, save_state
from .tune_student import Compiled, Student

__all__ = ["Compiled", "TuneEvents", "TuneSettings", "Tuned", "learning_rate", "tune"]

STATE = "tune.safetensors"
RESULT = "tune-result.safetensors"
"""What came out. Values are written over those that they were made from, and a run may be killed halfway through."""

SAVE_EVERY = 30.0
"""Seconds between two states on disk: what a killed run does again at most."""

BETAS = (0.9, 0.99)
"""Of Adam: with some hundred steps, a second moment over the last hundred."""

MARGIN = 0.9
"""Of the time box that is planned for: steps vary by some percent."""


@dataclass
class TuneEvents:
    """What a caller is told. original: (blocks of the original model that its text has been through, all of them).
    step: (steps done, steps planned, held-out KL last measured, seconds left)."""

    original: Callable[[int, int], None] = lambda done, blocks: None
    step: Callable[[int, int, float, float], None] = lambda done, steps, kl, seconds: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Tuned:
    """values: {stored name: tensor} to write in place of what is stored, empty where nothing is better. before, after:
    held-out KL divergence from the original, nats per token; after: of the values as stored. history: [(steps, held-out
    KL)]. seconds: spent, over all runs. left_out: {parameter: why} of quantized weights and norms that stay."""

    values: dict[str, Tensor]
    before: float
    after: float
    steps: int
    seconds: float
    history: list[tuple[int, float]]
    left_out: dict[str, str]


def tune(
    compiled: Compiled,
    tokens: Tensor,
    settings: TuneSettings,
    folder: Path,
    events: TuneEvents | None = None,
) -> Tuned:
    """Tune a compiled checkpoint on tokens int64 [sequences, seq_len], or go on where a killed run stopped.

    The state is in `folder` (tune*.safetensors), for the caller to delete once the values are written; until then the
    same call gives the same values again, also when some of them are written. The number of steps is fixed when a run
    begins; what comes out depends on nothing else, wherever it was killed. Raises PlanError for models whose output
    cannot be compared, FormatError for states of other settings and for full disks.
    """
    events = events or TuneEvents()
    start = time.monotonic()
    if len(tokens) < 4:
        raise PlanError(
            f"tuning needs at least 4 sequences of calibration text, 2 of them held out; got {len(tokens)}: give more "
            "(--calib-tokens), or use --effort normal"
        )
    key = _key(compiled, tokens, settings)
    kept = _load(folder / RESULT, key)
    if kept is not None:
        return Tuned(**{**kept[1], "values": kept[0], "history": [(step, kl) for step, kl in kept[1]["history"]]})
    with Student(
        compiled, DTYPES[settings.dtype], scales=settings.scale_rate > 0, norms=settings.norm_rate > 0
    ) as student:
        for reason in dict.fromkeys(student.left_out.values()):
            names = [name for name, why in student.left_out.items() if why == reason]
            events.note(f"not tuned: {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1) + f": {reason}")
        if student.parameters and settings.steps:
            tuned = _Run(student, tokens, settings, folder, key, events, start).all()
        else:
            events.note("tuning changes nothing: there is nothing to tune")
            tuned = Tuned({}, math.nan, math.nan, 0, 0.0, [], student.left_out)
    save_state(folder / RESULT, tuned.values, {"key": key} | {k: v for k, v in vars(tuned).items() if k != "values"})
    return tuned


@dataclass
class _Progress:
    """What is kept besides tensors. spent: seconds before this process. best: the step of the best evaluation."""

    steps: int
    step: int = 0
    best: int = 0
    spent: float = 0.0
    stopped: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)


class _Run:
    def __init__(
        self,
        student: Student,
        tokens: Tensor,
        settings: TuneSettings,
        folder: Path,
        key: str,
        events: TuneEvents,
        start: float,
    ) -> None:
        self.student, self.tokens, self.settings, self.events = student, tokens, settings, events
        self.folder, self.key, self.start = folder, key, start
        rates = {n: settings.scale_rate if n in student.linears else settings.norm_rate for n in student.parameters}
        groups = [{"params": [p], "initial_lr": rates[n]} for n, p in student.parameters.items()]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        self.best = self._copy()
        self.targets: dict[int, Tensor] = {}
        self.to_logits: Map = lambda x: x
        self.target_head: Map = student.head

    def nothing(self, reason: str, progress: _Progress) -> Tuned:
        self.events.note(f"tuning changes nothing: {reason}")
        kl = progress.history[0][1] if progress.history else math.nan
        return Tuned({}, kl, kl, progress.step, self._spent(progress), progress.history, self.student.left_out)

    def all(self) -> Tuned:
        student, settings = self.student, self.settings
        self.to_logits = logit_map(student)
        head_weight = f"{student.head_name}.weight"
        quantized = student.skeleton.tied.get(head_weight, head_weight) in student.compiled.schemes
        if quantized or student.skeleton.fold is not None:
            self.target_head = original_head(student.skeleton.source, torch.float32, student.device)
        progress = self._resume()
        if progress is None:
            progress = _Progress(self._affordable())
            if not progress.steps:
                return self.nothing(f"{settings.seconds:.0f} s are too short for a step", progress)
            self._save(progress)
        plan = schedule(len(self.tokens), self.tokens.shape[1], settings, progress.steps)
        self._targets(plan)
        if not progress.history:
            progress.history.append((0, self._held_out(plan)))
            self._save(progress)
        self._steps(plan, progress)
        return self._finish(plan, progress)

    # -- steps

    def _steps(self, plan: Schedule, progress: _Progress) -> None:
        saved = began = time.monotonic()
        first = progress.step
        while progress.step < plan.steps and not progress.stopped:
            self._step(plan, progress.step)
            progress.step += 1
            if progress.step % plan.every == 0 or progress.step == plan.steps:
                self._evaluate(plan, progress)
            now = time.monotonic()
            left = (now - began) / (progress.step - first) * (plan.steps - progress.step)
            self.events.step(progress.step, plan.steps, progress.history[-1][1], left)
            if self.settings.seconds is not None and self._spent(progress) >= self.settings.seconds:
                self._out_of_time(plan, progress)
            if now - saved >= SAVE_EVERY or progress.stopped or progress.step == plan.steps:
                self._save(progress)
                saved = now

    def _step(self, plan: Schedule, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * plan.rate(step)
        self.optimizer.zero_grad()
        self._divergence(plan.order[step], backward=True)
        self.optimizer.step()

    def _evaluate(self, plan: Schedule, progress: _Progress) -> None:
        kl = self._held_out(plan)
        best = dict(progress.history)[progress.best]
        progress.history.append((progress.step, kl))
        if kl < best:
            progress.best, self.best = progress.step, self._copy()
        else:
            since = sum(step > progress.best for step, _ in progress.history)
            progress.stopped = since >= max(1, self.settings.patience)
            if progress.stopped and progress.step < plan.steps:
                self.events.note(f"tuning stopped after {progress.step} steps: no better for {since} evaluations")

    def _out_of_time(self, plan: Schedule, progress: _Progress) -> None:
        """The plan fits with a margin; a machine that has become slower still ends in time."""
        if progress.step == plan.steps or progress.stopped:
            return
        self.events.note(f"tuning stopped after {progress.step} of {plan.steps} steps: the time is up")
        if progress.history[-1][0] != progress.step:
            self._evaluate(plan, progress)
        progress.stopped = True

    def _finish(self, plan: Schedule, progress: _Progress) -> Tuned:
        before = progress.history[0][1]
        if progress.best == 0:
            return self.nothing(f"the held-out KL divergence was {before:.4g} before and no better since", progress)
        self._put(self.best)
        values = self.student.values()
        self.student.store(values)
        after = self._held_out(plan)
        if not after < before:
            return self.nothing(f"rounded as stored, it gives {after:.4g} after {before:.4g}", progress)
        spent = self._spent(progress)
        return Tuned(values, before, after, progress.step, spent, progress.history, self.student.left_out)

    # -- computing

    def _divergence(self, sequences: list[int], *, backward: bool = False) -> float:
        target = torch.stack([self.targets[i] for i in sequences])
        with torch.set_grad_enabled(backward):
            hidden = self.student.hidden(self.tokens[sequences])
        return divergence(hidden, self.student.head, target, self.target_head, self.to_logits, backward=backward)

    def _held_out(self, plan: Schedule) -> float:
        batch = max(1, self.settings.step_tokens // self.tokens.shape[1])
        parts = [plan.held_out[i : i + batch] for i in range(0, len(plan.held_out), batch)]
        return sum(self._divergence(part) * len(part) for part in parts) / len(plan.held_out)

    def _targets(self, plan: Schedule) -> None:
        chosen = plan.sequences
        tokens = self.tokens[chosen]
        student, source = self.student, self.student.skeleton.source
        self.events.note(f"running the original model over {tokens.numel()} tokens")
        key = _digest(source.fingerprint(), tokens)
        rows = head_inputs_of(
            source, tokens, torch.float32, self.folder, key, SAVE_EVERY, self.events.original, student.device
        )
        self.targets = dict(zip(chosen, rows, strict=True))

    def _affordable(self) -> int:
        """How many steps fit in the time box, from the time that one takes, tried with the student as the original."""
        settings, seq_len = self.settings, self.tokens.shape[1]
        if settings.seconds is None:
            return settings.steps
        sequences = schedule(len(self.tokens), seq_len, settings, 1).order[0]
        with torch.no_grad():
            self.targets = dict(zip(sequences, self.student.hidden(self.tokens[sequences]), strict=True))
        device = self.student.device
        forward = _seconds(lambda: self._divergence(sequences), device)
        step = _seconds(lambda: self._divergence(sequences, backward=True), device)
        self.optimizer.zero_grad()
        held_out = len(held_out_of(len(self.tokens), seq_len, settings))
        left = settings.seconds * MARGIN - (time.monotonic() - self.start)

        def cost(steps: int) -> float:
            seen = min(steps * len(sequences), len(self.tokens) - held_out) + held_out
            looked = held_out * (evaluations(steps) + 2)  # before and after as well
            return steps * step + (seen + looked) * forward / len(sequences)

        return max((n for n in range(1, settings.steps + 1) if cost(n) <= left), default=0)

    # -- state

    def _spent(self, progress: _Progress) -> float:
        return progress.spent + time.monotonic() - self.start

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.student.parameters.items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.student.parameters.items():
                parameter.copy_(values[name])

    def _save(self, progress: _Progress) -> None:
        tensors = {f"now.{k}": v for k, v in self._copy().items()} | {f"best.{k}": v for k, v in self.best.items()}
        for name, parameter in self.student.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors = {name: value.cpu() for name, value in tensors.items()}
        values = asdict(progress) | {"spent": self._spent(progress)}
        save_state(self.folder / STATE, tensors, {"key": self.key, "progress": values})

    def _resume(self) -> _Progress | None:
        kept = _load(self.folder / STATE, self.key)
        if kept is None:
            return None
        tensors, values = kept
        self._put({name: tensors[f"now.{name}"] for name in self.student.parameters})
        self.best = {name: tensors[f"best.{name}"] for name in self.student.parameters}
        for name, parameter in self.student.parameters.items():
            if f"step.{name}" in tensors:  # not, for what has had no gradient yet
                moments = ("step", "exp_avg", "exp_avg_sq")
                state = {key: tensors[f"{key}.{name}"] for key in moments}
                # Adam keeps its number of steps on the CPU, its moments beside the parameter
                self.optimizer.state[parameter] = state | {k: state[k].to(parameter.device) for k in moments[1:]}
        progress = _Progress(**values["progress"])
        progress.history = [(step, kl) for step, kl in progress.history]
        self.events.note(f"going on with tuning after {progress.step} of {progress.steps} steps")
        return progress


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Of the second call: the first makes what later ones reuse."""
    action()
    wait_for(device)
    start = time.monotonic()
    action()
    wait_for(device)
    return time.monotonic() - start


def _load(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    kept = load_state(path)
    if kept is None:
        return None
    if kept[1].pop("key") != key:
        raise FormatError(f"{path} belongs to a tuning of another checkpoint or with other settings; delete it")
    return kept


def _key(compiled: Compiled, tokens: Tensor, settings: TuneSettings) -> str:
    """Of everything that the result depends on, scales apart: they are overwritten, and go with the codes."""
    schemes = {name: scheme.to_dict() for name, scheme in compiled.schemes.items()}
    text = json.dumps([compiled.skeleton.source.fingerprint(), asdict(settings), schemes], sort_keys=True)
    return _digest(text, tokens, *(compiled.read(stored_name(name, "codes")) for name in compiled.schemes))


def _digest(text: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
