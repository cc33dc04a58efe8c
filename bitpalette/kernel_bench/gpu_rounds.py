"""Interleaved rounds on a GPU: every contender once a round, as one CUDA graph of many calls, timed by events.

A graph goes round copies of the weight, so that between two uses of one more than MARGIN times the L2 has been read,
and holds LAUNCHES calls or more: a call's share of the graph's time is then the GPU's alone, without the microseconds
in which Python or the driver gets to the launch. A device copy of a buffer far beyond the L2 runs in every round: what
kernels read a second is held against what it reads and writes a second.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contender import Call, Contender
from .rounds import Timed

MARGIN = 3
"""Times the L2 that is read between two uses of a copy."""

LAUNCHES = 16
"""In a graph, at least."""

LONGEST_GRAPH = 0.05
"""Seconds of a graph beyond which it gets no further calls than one a copy."""

COPY_BYTES = 512 << 20
"""Read, and as many written: ten times an L2 of 50 MB."""

WARM_UP = 3


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


class Copier:
    """The measure of memory: one device-to-device copy. Its rate counts bytes read and bytes written."""

    def __init__(self, device: torch.device, nbytes: int = COPY_BYTES) -> None:
        self._from = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        self.bytes = 2 * nbytes

    def __call__(self) -> None:
        self._to.copy_(self._from)


@dataclass
class Graph:
    """`launches` calls, replayed at once."""

    launches: int
    replay: Callable[[], None]


def copies_wanted(nbytes: int, cache: int, memory: int) -> int:
    """Copies of a weight of `nbytes`, at least one, that exceed MARGIN times the cache within `memory` bytes."""
    wanted = -(-MARGIN * cache // max(1, nbytes)) + 1
    return max(1, min(wanted, memory // max(1, nbytes)))


def capture(calls: Sequence[Call], x: Tensor) -> Graph:
    """A graph that goes round `calls` with x, on a stream of its own. Every call runs once before the capture."""
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in calls:
            call(x)
        start.record(stream)
        for call in calls:
            call(x)
        stop.record(stream)
    torch.cuda.synchronize(x.device)
    rounds = 1
    if start.elapsed_time(stop) < 1e3 * LONGEST_GRAPH:
        rounds = max(1, -(-LAUNCHES // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call(x)
    return Graph(rounds * len(calls), graph.replay)


@torch.inference_mode()
def time_on_gpu(
    contenders: Sequence[tuple[Contender, list[Call]]],
    x: Tensor,
    *,
    rounds: int,
    memory: int,
    copier: Copier,
    cache: int | None = None,
) -> list[Timed]:
    """Time every contender with x [tokens, in] on a GPU; the lists hold its copies, kept and added to.

    memory: bytes that one contender's copies may take. cache: bytes of the L2, asked of the device where None. A
    contender whose result is not the expected one is not timed (`Timed.wrong`).
    """
    device = x.device
    cache = l2_bytes(device) if cache is None else cache
    timed = [Timed(contender, copies) for contender, copies in contenders]
    graphs: list[tuple[Timed, Graph]] = []
    for t in timed:
        z = t.contender.to_input(x)
        _check(t, z)
        if t.wrong:
            continue
        count = copies_wanted(t.contender.nbytes, cache, memory)
        while len(t.copies) < count:
            t.copies.append(t.contender.new_copy())
        t.footprint = count * t.contender.nbytes
        t.read_bytes = copier.bytes
        graphs.append((t, capture(t.copies[:count], z)))
    gc.collect()
    gc.disable()  # a collection between two launches would be a gap on the GPU
    try:
        _rounds(graphs, rounds, copier, device)
    finally:
        gc.enable()
    return timed


def _rounds(graphs: Sequence[tuple[Timed, Graph]], rounds: int, copier: Copier, device: torch.device) -> None:
    runs: list[Callable[[], None]] = [copier, *(graph.replay for _, graph in graphs)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
    for r in range(-WARM_UP, rounds):
        for run, (start, stop) in zip(runs, events, strict=True):
            start.record(torch.cuda.current_stream(device))
            run()
            stop.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        if r < 0:
            continue
        seconds = [max(start.elapsed_time(stop), 1e-6) / 1e3 for start, stop in events]
        for (t, graph), taken in zip(graphs, seconds[1:], strict=True):
            t.seconds[r] = taken / graph.launches
            t.read_seconds[r] = seconds[0]


def _check(t: Timed, z: Tensor) -> None:
    y = t.contender.first(z)
    if t.contender.expected is None:
        return
    t.error = t.contender.expected.error(y)
    allowed = t.contender.expected.tolerance
    if not t.error <= allowed:
        t.wrong = f"wrong: relative error {t.error:.3g}, allowed {allowed:.3g}; not timed"
