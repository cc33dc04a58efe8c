"""The GEMMs' body with one format and shape: groups with zero points, ragged edges, tiles shared by blocks.

Activations and scales are such that every product and sum is exact: the result has one right answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
RACE = "data race"
WRONG = "Mismatch|Not equal|differs"

MUTATIONS = {
    "gemm_barrier": {"plain": WRONG, "tsan": RACE},
    "gemm_live_stage": {"plain": WRONG, "tsan": RACE},
    "gemm_wait": {"plain": WRONG, "tsan": f"{RACE}|{WRONG}"},  # what it reads too early may be wrong at once
    "gemm_columns": {"plain": WRONG},
    "gemm_row_edge": {"plain": "bytes written|differs", "asan": "heap-buffer-overflow"},
    "gemm_sum_barrier": {"plain": WRONG, "tsan": RACE},
    "gemm_sum_reuse": {"plain": WRONG, "tsan": RACE},
    "gemm_part_fence": {"tsan": RACE},
    "gemm_counter_left": {"plain": WRONG},
}
INT4 = 2  # enum class Format
GROUP = 64
TWO_STAGES = 60_000  # bytes of shared memory that have room for no more steps under way


def check(executor: Any, defines: list[str]) -> None:
    chosen = ["GEMM_FORMAT=W4A16<IntFragment<Half,4>>", "GEMM_ONE_SHAPE=1"]
    library = executor.build([HERE / "gemm_entry.cpp"], defines=[*chosen, *defines])
    guarded, rng = executor.guarded, np.random.default_rng(0)
    n, k, m = (135, 840, 5) if executor.mode == "plain" else (135, 584, 3)
    np_, kp = -(-n // 64) * 64, -(-k // 64) * 64
    groups = kp // GROUP
    codes = rng.integers(0, 2**32, np_ * kp // 8, dtype=np.uint32)
    scale = np.zeros((groups, np_), np.float16)
    scale[:, :n] = rng.choice([-2, -1, -0.5, 0.5, 1, 2], (groups, n))
    zero = rng.integers(0, 16, (groups, np_), dtype=np.uint8)
    weight = dequantized(executor, codes, scale, zero, n, k)
    x = rng.integers(-1, 2, (m, k)).astype(np.float16)
    bias = rng.integers(-8, 8, n).astype(np.float16)
    want = x.astype(np.float64) @ weight.T + bias
    assert (np.abs(want) <= 2048).all()  # halves below 1024 and whole numbers below 2048 are fp16
    sizes = np.array([n, k, GROUP, 0, 0, INT4, m, m, 0, 3, TWO_STAGES, 2 * k, 2 * k, n], np.int64)
    plan = guarded(np.zeros(6, np.int64))
    library.call("gemm_plan", guarded(sizes), 1, plan)
    parts, counters, _, stages = (int(words) for words in plan.array[:4])
    assert stages == 2
    for options in executor.all_options(coresident=2):
        arrived = guarded(np.zeros(counters, np.uint32))
        for _ in range(2):  # the second with the counters that the first left
            y = guarded(np.full((m, n), np.nan, np.float16))
            work = guarded(np.full(parts, np.nan, np.float32))
            arrays = [guarded(v) for v in (codes, scale, zero)]
            inputs = [guarded(sizes), *arrays, None, None, None, guarded(bias), guarded(x), None, None]
            library.call("gemm_run", *inputs, y, work, arrived, options=options)
            np.testing.assert_array_equal(y.array, want.astype(np.float16), err_msg=f"differs, {options}")


def dequantized(executor: Any, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, n: int, k: int) -> np.ndarray:
    """float64 [n, k] by the kernel `dequantize`, which shares no decoder with the GEMM."""
    library = executor.build([CUDA / "dequantize.cu", CUDA / "embedding.cu", HERE / "dequantize_entry.cpp"])
    out = executor.guarded(np.full((n, k), np.nan, np.float32))
    fields = [executor.guarded(v) for v in (codes, scale, zero)]
    library.call("run_dequantize", INT4, *fields, None, None, None, n, k, GROUP, 0, 0, out, k, 0)
    return out.array.astype(np.float64)
