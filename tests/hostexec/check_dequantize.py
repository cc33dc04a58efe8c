"""dequantize of int codes of 4 and 8 bits, weight by weight from the words of the layout's description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
WRONG = "Mismatch|Not equal|differs"

MUTATIONS = {
    "dequantize_unguarded_edge": {"plain": "bytes written behind a buffer", "asan": "heap-buffer-overflow"},
    "dequantize_late_group": {"plain": WRONG},
}
FORMATS = {4: 2, 8: 3}  # bits -> enum class Format
NIBBLES = [(0, 0), (1, 0), (0, 2), (1, 2), (0, 1), (1, 1), (0, 3), (1, 3)]  # nibble -> (half, column)
BYTES = [0, 2, 1, 3]  # byte -> column


def code(words: np.ndarray, bits: int, n: int, k: int, across: int) -> int:
    """words: uint32 [superblocks, 128 * bits]."""
    block = words[n // 64 * across + k // 64]
    n16, k16, g, half, t, column = n % 64 // 16, k % 64 // 16, n % 8, n % 16 // 8, k % 16 // 4, k % 4
    if bits == 4:
        word = int(block.reshape(4, 8, 4, 4)[n16, g, t, k16])
        return word >> 4 * NIBBLES.index((half, column)) & 15
    word = int(block.reshape(4, 8, 4, 4, 2)[n16, g, t, k16, half])
    return word >> 8 * BYTES.index(column) & 255


def check(executor: Any, defines: list[str]) -> None:
    sources = [CUDA / "dequantize.cu", CUDA / "embedding.cu", HERE / "dequantize_entry.cpp"]
    library = executor.build(sources, defines=defines)
    guarded, rng = executor.guarded, np.random.default_rng(0)
    for bits, (n, k) in [(4, (19, 103)), (8, (70, 33))]:
        across = -(-k // 64)
        words = rng.integers(0, 2**32, (-(-n // 64) * across, 128 * bits), dtype=np.uint32)
        groups = (2 * across, -(-n // 64) * 64)  # of 32 columns
        scale = rng.standard_normal(groups).astype(np.float16)
        zero = rng.integers(0, 1 << bits, groups, dtype=np.uint8)
        codes = np.array([[code(words, bits, row, column, across) for column in range(k)] for row in range(n)])
        group = np.arange(k) // 32
        want = (codes - zero[group, :n].T.astype(np.int64)) * scale[group, :n].T.astype(np.float32)
        out = guarded(np.full((n, k), np.nan, np.float32))
        weight = [FORMATS[bits], guarded(words), guarded(scale), guarded(zero), None, None, None, n, k, 32, 0, 0]
        library.call("run_dequantize", *weight, out, k, 0)
        np.testing.assert_array_equal(out.array, want.astype(np.float32), err_msg=f"{bits} bits differ")
        index = np.array([n - 1, 3], np.int64)
        rows = guarded(np.full((2, k), np.nan, np.float32))
        library.call("run_embedding", *weight, guarded(index), rows, 2, k, 0)
        np.testing.assert_array_equal(rows.array, want[index].astype(np.float32), err_msg="rows differ")
