"""The measurement from shapes, schemes and settings to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate.plan import PlanError
from ..kernels.registry import kernels
from ..provenance import commit, last_level_cache, processor
from ..quant.native import available_isas, isa_index
from ..quant.scheme import Scheme, SchemeError
from ..quant.tensor import stored_bytes
from .baselines import NAMES, baseline, baseline_bytes
from .contender import CPU, Absent, Call, Contender, expected_output, packed_contender, scheme_label, variants
from .random_weight import random_weight
from .rounds import CLOCKS, MARGIN, Reader, make_reader, time_rounds
from .rows import Place, Row, absent_row, row_of
from .shapes import Layer

ASSUMED_CACHE = 64 << 20
"""Where the system does not tell the size of its last-level cache."""

Step = Callable[[str], None]
"""Called with a description as each measurement begins."""


@dataclass(frozen=True)
class Settings:
    tokens: tuple[int, ...]
    isas: tuple[str, ...]
    kernels: tuple[str, ...]
    threads: tuple[int, ...]
    dtype: torch.dtype
    rounds: int
    seconds: float
    memory: int
    cache: int
    seed: int
    clock: str = "wall"
    device: torch.device = CPU
    """A CPU: `measure`; a GPU: `gpu_run.measure_on_gpu`, for which threads, isas, seconds and clock say nothing."""


def choose_kernels(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in kernels():
            raise PlanError(f"--kernel is one of {list(kernels())}; got {name!r}")
    return tuple(names) or tuple(kernels())


def check_clock(clock: str, threads: Sequence[int]) -> None:
    if clock not in CLOCKS:
        raise PlanError(f"--clock is one of {list(CLOCKS)}; got {clock!r}")
    if clock == "cpu" and any(n > 1 for n in threads):
        raise PlanError(f"--clock cpu adds up what all threads compute: --threads 1 with it; got {max(threads)}")


def choose_isas(names: Sequence[str]) -> tuple[str, ...]:
    """Those named, else all of the machine. NativeError for one that it lacks."""
    for name in names:
        isa_index(name)
    return tuple(names) or tuple(reversed(available_isas()))


def cache_bytes() -> int:
    return last_level_cache() or ASSUMED_CACHE


def measure(
    layers: Sequence[Layer], schemes: Sequence[Scheme], settings: Settings, step: Step = lambda text: None
) -> Iterator[list[Row]]:
    """The rows of one layer, of one number of threads and one count of tokens after another."""
    where = (settings.clock, settings.cache, processor(), commit() or "installed")
    reader = make_reader(min(int(MARGIN * settings.cache), settings.memory // 4))
    for layer in layers:
        found: dict[tuple[int, int], list[Row]] = {(n, t): [] for n in settings.threads for t in settings.tokens}
        places = {(n, t): Place(layer, t, n, *where) for n, t in found}
        for part in _parts(layer, schemes, settings, reader):
            for where_measured, rows in _measure_part(part, places, settings, reader, step):
                found[where_measured] += [r for r in rows if part.first or r.kernel not in NAMES]
        yield from found.values()


@dataclass
class _Part:
    """Schemes of one shape that fit into the memory together with the baselines; `first`: whose baselines count."""

    schemes: list[Scheme]
    first: bool
    nbytes: int = 0
    absent: list[Absent] = field(default_factory=list)


def _parts(layer: Layer, schemes: Sequence[Scheme], settings: Settings, reader: Reader | None) -> Iterator[_Part]:
    """All schemes in one part where --memory allows it: each is then compared with the same rounds of the baselines."""
    copies = 2 * len(settings.threads)
    fixed = (0 if reader is None else reader.buffer.numel()) + copies * sum(baseline_bytes(layer.shape).values())
    part = _Part([], True, fixed)
    for scheme in schemes:
        try:
            one = stored_bytes(scheme, layer.shape)
        except SchemeError as error:
            part.absent.append(Absent("", scheme_label(scheme), str(error)))
            continue
        together = copies * one * len(list(variants(scheme, layer.shape, list(settings.kernels), list(settings.isas))))
        if not together:
            part.absent.append(Absent("", scheme_label(scheme), f"none of {list(settings.kernels)} runs it"))
            continue
        if part.schemes and part.nbytes + together > settings.memory:
            yield part
            part = _Part([], False, fixed)
        part.schemes.append(scheme)
        part.nbytes += together
    yield part


def _measure_part(
    part: _Part, places: dict[tuple[int, int], Place], settings: Settings, reader: Reader | None, step: Step
) -> Iterator[tuple[tuple[int, int], list[Row]]]:
    """Rows by (threads, tokens). The numbers of threads take turns within a round, so that they can be compared."""
    layer = next(iter(places.values())).layer
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(max(settings.tokens), layer.shape[1], generator=generator)
    taking_part: list[tuple[Contender, list[Call], int]] = []
    absent = list(part.absent)
    for name, nbytes in baseline_bytes(layer.shape).items():
        if nbytes > settings.memory // 3:
            reason = f"its weight takes {nbytes >> 20} MiB of {settings.memory >> 20}: raise --memory"
            found: Contender | Absent = Absent(name, "", reason)
        else:
            found = baseline(name, layer.shape, generator)
        if isinstance(found, Absent):
            absent.append(found)
        else:
            taking_part += [(found, [], n) for n in settings.threads]
    for scheme in part.schemes:
        for contender in _of_scheme(scheme, layer, settings, x, generator):
            taking_part += [(contender, [], n) for n in settings.threads]
    for tokens in settings.tokens:
        threads = ", ".join(str(n) for n in settings.threads)
        step(f"{layer.name} {layer.shape[0]}x{layer.shape[1]} tokens={tokens} threads={threads}".strip())
        timed = time_rounds(
            taking_part,
            x[:tokens],
            rounds=settings.rounds,
            seconds=settings.seconds,
            memory=settings.memory,
            cache=settings.cache,
            reader=reader,
            clock=CLOCKS[settings.clock],
        )
        alone = {id(t.contender): t for t in timed if t.threads == 1}
        for n in settings.threads:
            place, of_these = places[n, tokens], [t for t in timed if t.threads == n]
            baselines = {t.contender.kernel: t for t in of_these if t.contender.kernel in NAMES}
            rows = [row_of(t, place, baselines, alone.get(id(t.contender))) for t in of_these]
            yield (n, tokens), rows + [absent_row(a, place) for a in absent]


def _of_scheme(
    scheme: Scheme, layer: Layer, settings: Settings, x: Tensor, generator: torch.Generator
) -> list[Contender]:
    qt = random_weight(scheme, layer.shape, generator)
    expected = expected_output(qt, x, settings.dtype)
    return [
        packed_contender(kernel, isa, qt, settings.dtype, expected)
        for isa, kernel in variants(scheme, layer.shape, list(settings.kernels), list(settings.isas))
    ]
