"""What a compilation tells: of every weight, of the sizes, and while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One quantized weight, as reported: error is the relative squared output error (weight error without statistics);
    tokens is how many calibration tokens its layer saw (experts: the least of any); notes is what the solver told:
    `feedback_share`, rho of quant/ldlq.py, and `rows_recoded`, rows that got a wider scale."""

    parameter: str
    scheme: str
    shape: tuple[int, ...]
    bits_per_weight: float
    error: float
    tokens: int
    notes: dict[str, float] = field(default_factory=dict)


@dataclass
class Sizes:
    """Bytes and weights of the result, known beforehand. file_bytes: all weight files and their index, with headers."""

    file_bytes: int
    source_bytes: int
    quantized_weights: int
    quantized_bytes: int
    all_weights: int
    files: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Average over quantized weights, everything they store counted."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else 16.0

    @property
    def file_bits_per_weight(self) -> float:
        return 8 * self.file_bytes / self.all_weights


@dataclass
class Events:
    """What a caller is told while a compilation runs. begin: everything is checked, and work begins. tuning: (steps
    done, planned, held-out KL, seconds left)."""

    begin: Callable[[], None] = lambda: None
    layer: Callable[[Record, float], None] = lambda record, seconds: None
    part: Callable[[int, int], None] = lambda done, parts: None
    note: Callable[[str], None] = lambda text: None
    tuning: Callable[[int, int, float, float], None] = lambda done, steps, kl, seconds: None
