"""gemv_i8 with two planes and two tokens, rows shared by blocks, against the levels that `dequantize` decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
RACE = "data race"
WRONG = "Mismatch|Not equal|differs"

MUTATIONS = {
    "gemv_wait_off_by_one": {"plain": WRONG, "tsan": RACE},
    "gemv_missing_sync_warp": {"plain": WRONG, "tsan": RACE},
    "gemv_one_buffer": {"plain": WRONG, "tsan": RACE},
    "gemv_counter_left": {"plain": WRONG},
}
TRELLIS = 9  # enum class Format


def levels(executor: Any, codes: np.ndarray, n: int, k: int, row_bits: int) -> np.ndarray:
    """int64 [n, k]: what `dequantize` makes of the same words where every scale is 128."""
    library = executor.build([CUDA / "dequantize.cu", CUDA / "embedding.cu", HERE / "dequantize_entry.cpp"])
    scale = executor.guarded(np.full(-(-n // 64) * 64, 128, np.float16))
    out = executor.guarded(np.full((n, k), np.nan, np.float32))
    numbers = [n, k, 0, row_bits, 16]
    library.call("run_dequantize", TRELLIS, executor.guarded(codes), scale, *4 * [None], *numbers, out, k, 0)
    return out.array.astype(np.int64)


def check(executor: Any, defines: list[str]) -> None:
    library = executor.build([CUDA / "gemv_i8.cu", HERE / "gemv_i8_entry.cpp"], defines=defines)
    guarded, rng = executor.guarded, np.random.default_rng(0)
    row_bits, (n, k) = 48, (70, 1000)  # 2 x 16 superblocks
    np_, kp = -(-n // 64) * 64, -(-k // 64) * 64
    codes = rng.integers(0, 2**32, (np_ // 64) * (kp // 64) * 16 * row_bits // 2, dtype=np.uint32)
    weight = levels(executor, codes, n, k, row_bits)
    x = np.zeros((2, kp), np.int64)
    x[:, :k] = rng.integers(-32512, 32513, (2, k))
    high = (x + 128) >> 8
    planes = [p.reshape(2, -1, 4)[:, :, [0, 2, 1, 3]].reshape(2, kp).astype(np.int8) for p in (high, x - 256 * high)]
    want = (x[:, :k] @ weight.T).astype(np.float32) / np.float32(256)
    scale, one = guarded(np.full(np_, 128, np.float16)), guarded(np.ones(2, np.float32))
    size = guarded(np.zeros(1, np.int64))
    library.call("workspace_bytes", n, 2, 5, size)
    for options in executor.all_options(coresident=3):
        # 1: one row behind the other, whole; 5: a row in three parts, and a block that has some of both
        for blocks in (1, 5):
            workspace = guarded(np.zeros(int(size.array[0]), np.uint8))
            for _ in range(2):  # the second with the counters that the first left
                workspace.array[16:] = 0xFF  # what was there of sums does not count
                y = guarded(np.full((2, n), np.nan, np.float32))
                inputs = [guarded(codes), scale, n, k, row_bits, 16, *map(guarded, planes), one]
                outputs = [guarded(x.sum(1).astype(np.int32)), None, y, n, 2, 0, blocks, workspace]
                library.call("run_gemv_i8", *inputs, *outputs, options=options)
                np.testing.assert_array_equal(y.array, want, err_msg=f"differs, {blocks} blocks, {options}")
