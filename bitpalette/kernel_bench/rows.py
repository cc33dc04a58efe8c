"""One line of the result: a kernel, a shape, a count of tokens."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from .contender import Absent
from .rounds import Spread, Timed, read_rate, share_of_read, speed_over, spread
from .shapes import Layer

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """Medians of the rounds with p20 and p80. None: not measured, `note` says why."""

    layer: str
    out_features: int
    in_features: int
    tokens: int
    scheme: str
    kernel: str
    isa: str
    dtype: str
    """Of the input and output."""
    threads: int
    clock: str
    """wall; cpu: what the process computed; gpu: CUDA events."""
    packed_bits: float | None = None
    """Bits a weight, everything that the kernel reads counted."""
    rounds: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    gweights_per_s: float | None = None
    """out * in / time: how fast the weight is gone through, however many tokens share it."""
    gflops: float | None = None
    """2 * tokens * out * in / time."""
    gbytes_per_s: float | None = None
    """Packed bytes / time."""
    read_gbytes_per_s: float | None = None
    """Of a loop that only reads, in the same rounds; on a GPU of a copy, its reads and its writes."""
    read_share: float | None = None
    read_share_p20: float | None = None
    read_share_p80: float | None = None
    x_float32: float | None = None
    """Times the speed of torch's float32 linear; so for the others."""
    x_float32_p20: float | None = None
    x_float32_p80: float | None = None
    x_float16: float | None = None
    """On a GPU."""
    x_float16_p20: float | None = None
    x_float16_p80: float | None = None
    x_bfloat16: float | None = None
    x_bfloat16_p20: float | None = None
    x_bfloat16_p80: float | None = None
    x_int4: float | None = None
    x_int4_p20: float | None = None
    x_int4_p80: float | None = None
    x_int8: float | None = None
    x_int8_p20: float | None = None
    x_int8_p80: float | None = None
    x_one_thread: float | None = None
    """Times the speed of the same kernel on one thread, where that was measured too."""
    x_one_thread_p20: float | None = None
    x_one_thread_p80: float | None = None
    footprint_mib: float | None = None
    """Distinct memory read between two uses of the same copy of the weight."""
    cache_mib: float | None = None
    """Of the last-level cache."""
    from_memory: bool | None = None
    """The footprint exceeds the last-level cache."""
    error: float | None = None
    """Of the result, relative, before timing; None where nothing says what it should be."""
    note: str = ""
    device: str = ""
    commit: str = ""

    @property
    def wrong(self) -> bool:
        return self.note.startswith("wrong")


@dataclass(frozen=True)
class Place:
    """What rows of one measurement have in common."""

    layer: Layer
    tokens: int
    threads: int
    clock: str
    cache: int
    device: str
    commit: str


def row_of(timed: Timed, place: Place, baselines: Mapping[str, Timed], alone: Timed | None = None) -> Row:
    """baselines: those of `baselines.NAMES` that took part in the same rounds; alone: the same kernel on one thread."""
    c = timed.contender
    row = _empty(place, c.scheme, c.kernel, c.isa, c.dtype, timed.wrong)
    if timed.wrong:
        return _with(row, error=timed.error)
    weights = c.shape[0] * c.shape[1]
    time = spread(list(timed.seconds.values()))
    values: dict[str, object] = {
        "packed_bits": round(8 * c.nbytes / weights, 4),
        "rounds": len(timed.seconds),
        "median_us": round(1e6 * time.median, 2),
        "p20_us": round(1e6 * time.p20, 2),
        "p80_us": round(1e6 * time.p80, 2),
        "gweights_per_s": _digits(weights / time.median / 1e9),
        "gflops": _digits(2 * place.tokens * weights / time.median / 1e9),
        "gbytes_per_s": _digits(c.nbytes / time.median / 1e9),
        "footprint_mib": round(timed.footprint / MIB, 1),
        "from_memory": timed.footprint > place.cache,
        "error": timed.error,
    }
    rate = read_rate(timed)
    values["read_gbytes_per_s"] = None if rate is None else _digits(rate.median / 1e9)
    values |= _three("read_share", share_of_read(timed))
    for name, other in baselines.items():
        values |= _three("x_" + name.removeprefix("torch."), speed_over(timed, other))
    if alone is not None:
        values |= _three("x_one_thread", speed_over(timed, alone))
    if not values["from_memory"]:
        values["note"] = (
            f"from the cache: {values['footprint_mib']} MiB are gone round, the cache has {place.cache / MIB:g} MiB"
        )
    return _with(row, **values)


def absent_row(absent: Absent, place: Place) -> Row:
    return _empty(place, absent.scheme, absent.kernel, "", "", absent.reason)


def _empty(place: Place, scheme: str, kernel: str, isa: str, dtype: str, note: str) -> Row:
    out, n = place.layer.shape
    return Row(
        *(place.layer.name, out, n, place.tokens, scheme, kernel, isa, dtype, place.threads, place.clock),
        cache_mib=round(place.cache / MIB, 1),
        note=note,
        device=place.device,
        commit=place.commit,
    )


def _with(row: Row, **changes: object) -> Row:
    return Row(**(asdict(row) | changes))


def _three(name: str, value: Spread | None) -> dict[str, object]:
    if value is None:
        return {}
    return {name: _digits(value.median), f"{name}_p20": _digits(value.p20), f"{name}_p80": _digits(value.p80)}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def to_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
