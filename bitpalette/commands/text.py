"""Numbers as people read them, and the machine's figures."""

from __future__ import annotations

import resource
import sys


def size(n: float) -> str:
    """1234567 -> "1.23 MB" (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def parse_size(text: str) -> int:
    """ "500MB" -> 500000000; decimal units, a bare number is bytes. ValueError otherwise."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.strip().upper()
    for unit, factor in units.items():
        if number.endswith(unit):
            return int(float(number[: len(number) - len(unit)]) * factor)
    raise ValueError(text)


def sized(option: str, text: str) -> int:
    """Bytes. PlanError, with the option's name, for what is no size."""
    from ..calibrate.plan import PlanError

    try:
        return parse_size(text)
    except (ValueError, OverflowError):
        raise PlanError(f"{option} {text!r} is no size such as 90MB or 4GB") from None


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
