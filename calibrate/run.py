"""One run of a compilation: the calibration set's way through the blocks, each quantized, written and entered in the
journal; then, where the plan says so, the tuning of what was written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..formats.native import stored_name
from ..formats.shards import ShardWriter
from ..quant.scheme import Scheme
from ..quant.solver import quantize_tensor
from ..quant.stats import Stats, output_error
from ..quant.tensor import QuantizedTensor, field_specs, stack
from . import stream as streaming
from .collect import collecting, finished
from .collect_stats import calibration_tokens, collect_statistics, head_stats, missing_parts
from .fisher import fisher_diagonal
from .journal import Journal
from .plan import PlanError
from .report import Record
from .store import LayerStats, StatsStore
from .stream import Stream
from .text import Calibration
from .tune import TuneEvents, TuneSettings, learning_rate, tune
from .tune_student import Compiled
from .whole import load_model

HIDDEN_EVERY = 20.0
"""Seconds between two copies of the hidden states on disk: what a killed run computes again at most, roughly."""

TUNE_STEPS = 128
TUNE_PASSES = 3
"""Times that a sequence is looked at, at most: the fit would be to the text otherwise."""


class Run:
    """The state of one run: where the calibration set stands, and what has been written. Parts of the model, their
    statistics and their coding are on the compilation's device, one part at a time; what goes to files, and the hidden
    states between two blocks, on the CPU."""

    def __init__(self, compilation: Any, journal: Journal, writer: ShardWriter) -> None:
        self.c, self.journal, self.writer = compilation, journal, writer
        self.skeleton = compilation.skeleton
        self.skeleton.use(compilation.device)
        self.begun = False
        self.tokens: Tensor | None = None
        self.stream: Stream | None = None
        self.store: StatsStore | None = None
        if compilation.stats is not None:
            origin = {k: compilation.job[k] for k in ("model", "calibration", "dtype")}
            folded = compilation.skeleton.fold is not None  # then inputs are those of the rotated model
            origin["fold"] = compilation.plan.seed if folded else None
            self.store = StatsStore(compilation.stats, origin)

    def all(self) -> None:
        blocks = len(self.skeleton.blocks)
        done = len(self.journal.parts)
        self.c.events.part(done, blocks + 1)
        if self.c.needs_stats and done <= blocks:
            self._fisher()
        if self.store is not None and done <= blocks:
            self._collect(self.store)
        elif self.c.needs_stats and done <= blocks:
            self._start(done)
        self._begin()
        for part in range(done, blocks + 1):
            records = list(self._block(part) if part < blocks else self._outside())
            self.writer.sync()
            self.journal.add({"part": part, "layers": [asdict(r) for r in records]})
            self.c.events.part(part + 1, blocks + 1)
            if self.stream is not None and part < blocks:
                self._advance(part)
                self.journal.save_hidden(part + 1, self.stream.hidden, HIDDEN_EVERY)
        if self.c.plan.tune and len(self.journal.parts) == blocks + 1:
            self._tune()

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self.c.events.begin()

    def _tune(self) -> None:
        """Scales and norms fitted to the original model's output, in place of those written."""
        assert self.c.calibration is not None
        if self.tokens is None:
            self.tokens = self._tokens(self.c.calibration)
        self.stream = None
        compiled = Compiled(self.skeleton, self.c.schemes, self.writer.read)
        settings = tune_settings(self.c)
        self.c.events.note(f"tuning scales and norms to the original model's output: at most {settings.steps} steps")
        events = TuneEvents(step=self.c.events.tuning, note=self.c.events.note)
        tuned = tune(compiled, self.tokens, settings, self.journal.work, events)
        for name, value in tuned.values.items():
            self.writer.write(name, value)
        self.writer.sync()
        told = {"steps": tuned.steps, "seconds": round(tuned.seconds, 1), "history": tuned.history}
        if tuned.values:
            told |= {"kl_before": tuned.before, "kl_after": tuned.after}
        self.journal.add({"part": "tuning", "layers": [], "tuning": told})

    def _start(self, block: int) -> None:
        """The stream at the input of `block`: from the hidden states kept last, through the blocks written since."""
        assert self.c.calibration is not None
        self.tokens = self._tokens(self.c.calibration)
        self._begin()
        self.stream = streaming.start(self.skeleton, self.tokens, self.c.dtype)
        kept = self.journal.hidden(block)
        first = 0
        if kept is not None:
            first, self.stream.hidden = kept
        for i in range(first, block):
            self._advance(i)

    def _fisher(self) -> None:
        """The Fisher diagonals that solvers ask for, of the original model, kept in the work folder."""
        assert self.c.calibration is not None
        if not self.c.by_fisher or self.journal.has_fisher():
            return
        weights = {n: w for n, w in self.c.weights.items() if n in self.c.by_fisher}
        tokens = self._tokens(self.c.calibration)
        self._begin()
        self.c.events.note(f"Fisher diagonals of {len(weights)} weights: {self.c.calibration.tokens} tokens, backwards")
        model = load_model(self.c.source, torch.float32, self.c.device)
        fisher = fisher_diagonal(model, weights, tokens, self.c.plan.seed)
        self.journal.save_fisher({name: diagonal.cpu() for name, diagonal in fisher.items()})

    def _tokens(self, calibration: Calibration) -> Tensor:
        kept = self.journal.tokens()
        if kept is not None:
            return kept
        tokens = calibration_tokens(self.c.source, calibration, self.skeleton, self.c.dtype)
        self.journal.save_tokens(tokens)
        return tokens

    def _collect(self, store: StatsStore) -> None:
        """The statistics of the original model that the folder lacks."""
        if not missing_parts(store, self.skeleton):
            self.c.events.note(f"statistics from {store.folder}")
            return
        assert self.c.calibration is not None
        self.tokens = self._tokens(self.c.calibration)
        self._begin()
        collect_statistics(self.skeleton, self.c.weights, store, self.tokens, self.c.dtype)

    def _block(self, index: int) -> Iterator[Record]:
        names = self.skeleton.parameters_of(index)
        stats: dict[str, LayerStats] = {}
        with self.skeleton.loaded(names) as originals:
            if self.store is not None:
                stats = self.store.load(index, self.c.device)
            elif self.stream is not None:
                self.skeleton.cast(names, self.c.dtype)
                weights = {n: self.c.weights[n] for n in names if n in self.c.schemes}
                with collecting(self.skeleton.model, weights) as moments, torch.no_grad():
                    self.stream.run(self.skeleton.blocks[index][1], index, keep=False)
                stats = finished(moments)
        yield from self._write(originals, stats)

    def _outside(self) -> Iterator[Record]:
        names = self.skeleton.parameters_of(None)
        if self.store is not None:
            stats = self.store.load(len(self.skeleton.blocks), self.c.device)
        else:
            heads = [n for n in names if n in self.c.schemes and self.c.weights[n].head]
            stats = head_stats(self.skeleton, self.c.weights, heads, self.tokens, self.stream, self.c.dtype)
        self.stream = None
        # embeddings and head are the largest weights: one at a time, unless folding needs the norm's gain beside them
        for part in [names] if self.skeleton.fold is not None else [[name] for name in names]:
            with self.skeleton.loaded(part) as originals:
                pass
            yield from self._write(originals, stats)

    def _write(self, originals: dict[str, Tensor], stats: dict[str, LayerStats]) -> Iterator[Record]:
        """Quantize and write a part's tensors, each let go of once it is written."""
        for name in list(originals):
            w = originals.pop(name)
            if name not in self.c.schemes:
                self.writer.write(name, w)
                continue
            start = time.monotonic()
            qt, record = self._quantize(name, w, stats.pop(name, None))
            for key, value in qt.fields.items():
                self.writer.write(stored_name(name, key), value)
            self.c.events.layer(record, time.monotonic() - start)
            yield record

    def _quantize(self, name: str, w: Tensor, stats: Any) -> tuple[QuantizedTensor, Record]:
        weight, scheme = self.c.weights[name], self.c.schemes[name]
        solver = self.c.solver(name, scheme)
        if weight.kind == "conv1d":
            w = w.T
        if name in self.c.by_fisher:
            stats = replace(stats, fisher=self.journal.fisher(name).to(self.c.device))
        if solver == "rtn":
            stats = [None] * w.shape[0] if w.ndim == 3 else None
        try:
            if w.ndim == 3:
                pairs = [self._one(m, scheme, solver, s) for m, s in zip(w, stats, strict=True)]
                qt, error = stack([q for q, _ in pairs]), sum(e for _, e in pairs) / len(pairs)
                tokens = min((s.tokens for s in stats if s is not None), default=0)
            else:
                qt, error = self._one(w, scheme, solver, stats)
                tokens = stats.tokens if stats is not None else 0
        except ValueError as problem:
            raise PlanError(f"{name}: {problem}; give it another scheme (--set) or --keep it") from problem
        return qt, Record(name, str(scheme), tuple(w.shape), round(qt.bits_per_weight, 6), error, tokens, qt.notes)

    def _one(self, w: Tensor, scheme: Scheme, solver: str, stats: Stats | None) -> tuple[QuantizedTensor, float]:
        qt = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=self.c.plan.seed)
        return qt, output_error(w, qt.dequantize(), stats)

    def _advance(self, index: int) -> None:
        """The stream through a block as written."""
        assert self.stream is not None
        names = self.skeleton.parameters_of(index)
        for name in names:
            if name in self.c.schemes:
                weight, scheme = self.c.weights[name], self.c.schemes[name]
                specs = field_specs(scheme, weight.shape)
                fields = {f: self.writer.read(stored_name(name, f)) for f in specs}
                w = QuantizedTensor(scheme, weight.shape, fields).to(self.c.device).dequantize(self.c.dtype)
                self.skeleton.put(name, w.T.contiguous() if weight.kind == "conv1d" else w)
            else:
                self.skeleton.put(name, self.writer.read(name).to(self.c.device))
        self.skeleton.cast(names, self.c.dtype)
        with torch.no_grad():
            self.stream.run(self.skeleton.blocks[index][1], index, keep=True)
        self.skeleton.release(names)


def tune_settings(compilation: Any) -> TuneSettings:
    """How a compilation tunes: rates by its bits, steps by its text (each sequence a few times at most)."""
    calibration = compilation.calibration
    rate = learning_rate(compilation.sizes().bits_per_weight)
    sequences = max(1, calibration.tokens // calibration.seq_len)
    return TuneSettings(
        steps=min(TUNE_STEPS, TUNE_PASSES * sequences),
        scale_rate=rate,
        norm_rate=rate,
        step_tokens=max(512, calibration.seq_len),
        seconds=compilation.tune_seconds,
        seed=compilation.plan.seed,
    )
