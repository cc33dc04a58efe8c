"""How a Triton product is launched: which launches are worth trying for a problem, and which one without trying."""

from __future__ import annotations

from dataclasses import dataclass

from .tile_codes import padded
from .triton_format import TileFormat

MOST_PARTS = 16
"""Of a row's columns: each costs a plane of float32 sums to write and to read again."""

TOKEN_BLOCKS = (16, 32, 64)


@dataclass(frozen=True)
class Launch:
    """block_n rows of W by block_m tokens a program, block_k columns a step; parts: programs that share a row."""

    block_n: int
    block_m: int
    block_k: int
    parts: int
    warps: int
    stages: int

    def grid(self, n: int, m: int) -> tuple[int, int, int]:
        return -(-n // self.block_n), -(-m // self.block_m), self.parts


INTERPRETED = Launch(block_n=64, block_m=16, block_k=128, parts=2, warps=4, stages=2)
"""Small, and with every path of a kernel in it: several programs, steps and parts."""


@dataclass(frozen=True)
class Problem:
    """What a launch is chosen for. operation: "w16" or "w8"; tokens: the upper end of the class, see `token_class`."""

    operation: str
    form: TileFormat
    dtype: str
    shape: tuple[int, int]
    tokens: int

    def key(self) -> str:
        """Its name in the table of tuned launches."""
        return f"{self.operation} {self.form} {self.dtype} {self.shape[0]}x{self.shape[1]} M<={self.tokens}"


def token_class(tokens: int) -> int:
    """Numbers of tokens with one launch: up to 16, 32, 64, ..., 4096 and all above."""
    return min(4096, max(16, 1 << (tokens - 1).bit_length()))


def least_step(problem: Problem) -> int:
    """Columns of the shortest step: matrix instructions want 16 columns of words (decode.py), or 32 of int8."""
    return 64 * 16 // problem.form.word_columns


def default_launch(problem: Problem, processors: int) -> Launch:
    """A launch without trying: two programs or more to each of the GPU's `processors` (multiprocessors), where the rows
    and columns are enough for that. None spills registers on sm_80 and sm_90 (bench/static_triton.py)."""
    block_m = min(_block_m(problem.tokens), 64 if _few_registers(problem) else 32)
    block_n = 128
    block_k = max(64, least_step(problem))
    parts = _parts(problem, block_n, block_m, block_k, 2 * processors)
    # a third stage would also prefetch what the first prefetch points to: entries of a table
    stages = 2 if problem.form.kind in ("table", "trellis") else 3
    return Launch(block_n, block_m, block_k, parts, warps=4, stages=stages)


def candidates(problem: Problem, processors: int) -> list[Launch]:
    """Launches to time, the default first: at most 13."""
    found = [default_launch(problem, processors)]
    block_m, step = _block_m(problem.tokens), least_step(problem)
    blocks = ((128, 64), (256, 64), (256, 32)) if problem.tokens > 64 else ((64, block_m), (128, block_m))
    for block_n, m in blocks:
        for block_k in (step, 2 * step):
            for programs in (processors, 4 * processors) if problem.tokens <= 256 else (processors,):
                parts = _parts(problem, block_n, m, block_k, programs)
                warps = max(4, block_n // 32)  # a warp has 16 rows of each half; more would repeat each other's work
                for stages in (2, 4) if problem.tokens > 64 else (4,):
                    launch = Launch(block_n, m, block_k, parts, warps, stages)
                    if launch not in found:
                        found.append(launch)
    return found[:13]


def _block_m(tokens: int) -> int:
    return next((block for block in TOKEN_BLOCKS if tokens <= block), TOKEN_BLOCKS[-1])


def _few_registers(problem: Problem) -> bool:
    """64 tokens' sums fit in registers beside the operands."""
    form = problem.form
    symmetric_or_row = form.zero is not None or form.group_size == 0
    return problem.operation == "w8" or (form.layout == "bits4" and form.group_size != 32 and symmetric_or_row)


def _parts(problem: Problem, block_n: int, block_m: int, block_k: int, programs: int) -> int:
    """The power of two that brings the grid nearest to `programs` from below, with two steps to a part or more."""
    rows = -(-problem.shape[0] // block_n) * -(-problem.tokens // block_m)
    steps = padded(problem.shape[1]) // block_k
    most = min(MOST_PARTS, programs // rows, steps // 2)
    return 1 << (max(1, most).bit_length() - 1)
