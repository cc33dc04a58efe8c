"""What a plan may cost: bits, bytes of files, memory while it runs, time of a token; one of these or several."""

from __future__ import annotations

from dataclasses import dataclass

from .calibrate.plan import PlanError
from .formats.plan_file import BudgetValues


@dataclass(frozen=True)
class Budget:
    """At least one limit. bits: average over the weights that are quantized, scales counted; size_bytes: of all files;
    memory_bytes: of a process that serves `batch` rows of `context` tokens; tokens_per_second: of one row, decoding on
    `device` with `threads` (None: torch's)."""

    bits: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    context: int | None = None
    batch: int = 1
    tokens_per_second: float | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if all(x is None for x in (self.bits, self.size_bytes, self.memory_bytes, self.tokens_per_second)):
            raise PlanError("a plan needs a budget: --bits, --size, --memory with --context, or --tokens-per-second")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise PlanError(f"--bits {self.bits:g}: an average of 1 to 8 bits a weight")
        if (self.memory_bytes is None) != (self.context is None):
            raise PlanError("--memory is for a --context in tokens, and the other way round: give both")
        if (self.context is not None and self.context < 1) or self.batch < 1:
            raise PlanError(f"--context {self.context} and --batch {self.batch} are numbers of 1 or more")
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            raise PlanError(f"--tokens-per-second {self.tokens_per_second:g}: a number above 0")

    def values(self) -> BudgetValues:
        return BudgetValues(
            bits=self.bits,
            size_bytes=self.size_bytes,
            memory_bytes=self.memory_bytes,
            context=self.context,
            batch=self.batch,
            tokens_per_second=self.tokens_per_second,
            device=None if self.tokens_per_second is None else self.device,
        )
