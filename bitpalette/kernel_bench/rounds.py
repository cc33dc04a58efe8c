"""Interleaved rounds: every contender once, each followed by a loop that only reads as many bytes.

A slow moment of the machine then hits all of them alike, and ratios are taken within a round. Each contender goes round
copies of its weight, so that between two uses of the same copy more than the last-level cache has been read. Code and
input are warm, as in a model that calls one kernel for layer after layer: an untimed call on a copy kept for that comes
first. Without it a call after a long one of another contender takes 30 us longer than one after a short one.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..quant.native import chosen_isa, cpu_module, isa_index, why_no_cpu_module
from .contender import Call, Contender

Clock = Callable[[], float]

MIB = 1 << 20

MARGIN = 1.5
"""Times the last-level cache that is read between two uses of a copy: caches are not filled in strict order."""

MOST_READ = 64 * MIB
"""Bytes of one reading at most: more do not change the figure (16.5 GB/s at 64 MiB, 15.3 at 8), only the time."""

MOST_COPIES = 512
FEWEST_ROUNDS = 4
WARM_UP = 2

LONG = 0.02
"""Seconds of a call beside which cold code does not count: it is not called twice."""


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: what the process computed, whatever else ran; a speed for one thread only."""


class Reader:
    """The read loop of csrc/cpu/bandwidth.h over a buffer that it goes round."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.ones(max(nbytes, 4096), dtype=torch.uint8)  # written: untouched pages are one page of zeros
        self._at = 0

    def seconds(self, isa: str, nbytes: int, clock: Clock = time.perf_counter) -> float:
        """Of reading `nbytes` with that instruction set (empty: the fastest) on torch's threads."""
        if self._at + nbytes > self.buffer.numel():
            self._at = 0
        read, index, threads = cpu_module().read_bytes, isa_index(isa or chosen_isa()), torch.get_num_threads()
        address = self.buffer.data_ptr() + self._at
        read(index, self.buffer.data_ptr(), 4096, threads)  # warm code, as the contenders have it
        start = clock()
        read(index, address, nbytes, threads)
        seconds = clock() - start
        self._at += -(-nbytes // 64) * 64
        return seconds

    def bytes_for(self, nbytes: int) -> int:
        """Bytes that are read beside a weight of `nbytes`."""
        return max(8, min(nbytes, MOST_READ, self.buffer.numel()))


def make_reader(nbytes: int) -> Reader | None:
    """None without native code: there is no limit to hold kernels against then."""
    return None if why_no_cpu_module() else Reader(nbytes)


@dataclass
class Timed:
    """One contender's rounds at one count of tokens."""

    contender: Contender
    copies: list[Call]
    threads: int = 1
    stride: int = 1
    """It takes part in every stride-th round: slow kernels get fewer rounds for the same time."""
    estimate: float = 0.0
    """Seconds of a call, before the rounds."""
    seconds: dict[int, float] = field(default_factory=dict)
    read_seconds: dict[int, float] = field(default_factory=dict)
    read_bytes: int = 0
    footprint: int = 0
    """Distinct bytes that are read between two uses of the same copy."""
    error: float | None = None
    wrong: str = ""
    """Why it was not timed: its result is not the codec's."""


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def speed_over(timed: Timed, other: Timed) -> Spread | None:
    """How many times as fast `timed` is, by the rounds that both took part in; None where there are none."""
    common = timed.seconds.keys() & other.seconds.keys()
    return spread([other.seconds[r] / timed.seconds[r] for r in common]) if common else None


def share_of_read(timed: Timed) -> Spread | None:
    """Bytes of the weight a second, by those that the read loop reached in the same rounds."""
    if not timed.read_seconds:
        return None
    rate = timed.contender.nbytes / timed.read_bytes
    return spread([rate * timed.read_seconds[r] / s for r, s in timed.seconds.items()])


def read_rate(timed: Timed) -> Spread | None:
    """Bytes a second of the read loop."""
    if not timed.read_seconds:
        return None
    return spread([timed.read_bytes / s for s in timed.read_seconds.values()])


@torch.inference_mode()
def time_rounds(
    contenders: Sequence[tuple[Contender, list[Call], int]],
    x: Tensor,
    *,
    rounds: int,
    seconds: float,
    memory: int,
    cache: int,
    reader: Reader | None,
    clock: Clock = time.perf_counter,
) -> list[Timed]:
    """Time every contender with x float32 [tokens, in].

    The lists hold each contender's copies, which are kept and added to; empty at first. The numbers are torch's
    threads while it runs. A contender that computes something else than it should is not timed. seconds: for one
    contender, about, if that leaves FEWEST_ROUNDS. memory: bytes that all copies and the reader may take together.
    cache: bytes of the last-level cache.
    """
    timed = [Timed(c, copies, threads) for c, copies, threads in contenders]
    inputs = [t.contender.to_input(x) for t in timed]
    before = torch.get_num_threads()
    try:
        return _time_rounds(timed, inputs, rounds, seconds, memory, cache, reader, clock)
    finally:
        torch.set_num_threads(before)


def _time_rounds(
    timed: list[Timed],
    inputs: list[Any],
    rounds: int,
    seconds: float,
    memory: int,
    cache: int,
    reader: Reader | None,
    clock: Clock,
) -> list[Timed]:
    for t, z in zip(timed, inputs, strict=True):
        torch.set_num_threads(t.threads)
        _check_and_pace(t, z, rounds, seconds)
    entered = [(t, z) for t, z in zip(timed, inputs, strict=True) if not t.wrong]
    if reader is not None:
        for t, _ in entered:
            t.read_bytes = reader.bytes_for(t.contender.nbytes)
    footprint = _make_copies([t for t, _ in entered], memory, cache, reader)
    for t, _ in entered:
        t.footprint = footprint
    gc.collect()
    gc.disable()  # a collection in the middle of a call would be counted as its time
    try:
        for r in range(-WARM_UP, rounds):
            for t, z in entered:
                if r % t.stride == 0:
                    _one_call(t, z, r, reader, clock)
    finally:
        gc.enable()
    return timed


def _one_call(t: Timed, z: Any, r: int, reader: Reader | None, clock: Clock) -> None:
    copy = t.copies[r // t.stride % len(t.copies)]
    torch.set_num_threads(t.threads)
    if t.estimate < LONG:
        t.contender.first(z)
    start = clock()
    copy(z)
    taken = clock() - start
    read = reader.seconds(t.contender.isa, t.read_bytes, clock) if reader is not None else None
    if r >= 0:
        t.seconds[r] = max(taken, 1e-9)
        if read is not None:
            t.read_seconds[r] = max(read, 1e-9)


def _check_and_pace(t: Timed, z: Any, rounds: int, seconds: float) -> None:
    """Compare the result with what is expected, and decide how many rounds the contender takes part in."""
    first = t.contender.first
    y = first(z)
    if t.contender.expected is not None:
        t.error = t.contender.expected.error(y)
        allowed = t.contender.expected.tolerance
        if not t.error <= allowed:
            t.wrong = f"wrong: relative error {t.error:.3g}, allowed {allowed:.3g}; not timed"
            return
    start = time.perf_counter()
    first(z)
    t.estimate = time.perf_counter() - start
    most = max(1, rounds // FEWEST_ROUNDS)
    while t.stride * 2 <= most and t.estimate * rounds / t.stride > seconds:
        t.stride *= 2  # powers of two: any two contenders have rounds in common


def _make_copies(timed: Sequence[Timed], memory: int, cache: int, reader: Reader | None) -> int:
    """Fill the lists of copies, and say how many distinct bytes are then read between two uses of one."""
    buffer = 0 if reader is None else reader.buffer.numel()

    def count(rounds: int) -> list[int]:
        """Copies that each contender needs for none to be used twice within so many rounds."""
        return [max(1, -(-rounds // t.stride)) for t in timed]

    def read_within(rounds: int) -> int:
        weights = sum(t.contender.nbytes * n for t, n in zip(timed, count(rounds), strict=True))
        beside = sum(t.read_bytes * n for t, n in zip(timed, count(rounds), strict=True))
        return weights + min(beside, buffer)

    def held(rounds: int) -> int:
        return buffer + sum(t.contender.nbytes * (1 + n) for t, n in zip(timed, count(rounds), strict=True))

    rounds = 1
    while rounds < MOST_COPIES and read_within(rounds) < MARGIN * cache and held(rounds + 1) <= memory:
        rounds += 1
    for t, n in zip(timed, count(rounds), strict=True):
        torch.set_num_threads(t.threads)
        z = t.contender.to_input(torch.zeros(1, t.contender.shape[1]))
        while len(t.copies) < n:
            copy = t.contender.new_copy()
            copy(z)  # what a kernel sets up at its first call is no part of the time
            t.copies.append(copy)
        del t.copies[n:]  # fewer tokens needed more: memory for the others
    return read_within(rounds)
