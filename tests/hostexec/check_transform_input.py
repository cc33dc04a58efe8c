"""transform_input, rotated and quantized, against the transform's definition in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
RACE = "data race"
WRONG = "Mismatch|Not equal|differs"
PLANES = 2

MUTATIONS = {
    "transform_missing_barrier": {"plain": WRONG, "tsan": RACE},
    "transform_in_place": {"plain": WRONG, "tsan": RACE},
}


def check(executor: Any, defines: list[str]) -> None:
    library = executor.build([CUDA / "transform_input.cu", HERE / "transform_input_entry.cpp"], defines=defines)
    guarded, rng = executor.guarded, np.random.default_rng(0)
    p, log2 = 19, 6  # two passes; two threads to a column of the Hartley part
    n = p << log2
    index = np.arange(p)
    angle = 2 * np.pi * np.outer(index, index) / p
    odd = (np.cos(angle) + np.sin(angle)) / np.sqrt(p)
    rotation = odd
    for _ in range(log2):
        rotation = np.kron(rotation, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
    signs = rng.integers(0, 256, n // 8, dtype=np.uint8)
    order = rng.permutation(n).astype(np.int32)
    x = rng.standard_normal((2, n)).astype(np.float32)
    plus_minus = 1.0 - 2.0 * np.unpackbits(signs, bitorder="little")
    want = ((x * plus_minus) @ rotation)[:, order]
    matrix = np.zeros((p, 32), np.float32)
    matrix[:, :p] = odd
    for options in executor.all_options():
        for limit in (1 << 16, 1024):  # in shared memory, and in the workspace
            y, low = (guarded(np.full((2, n), 99, np.int8)) for _ in range(2))
            scale, total = guarded(np.full(2, np.nan, np.float32)), guarded(np.zeros(2, np.int32))
            workspace = guarded(np.full((2, n), np.nan, np.float32))
            transform = [None, guarded(signs), 1, guarded(matrix), guarded(order)]
            outputs = [PLANES, y, low, scale, total, n, workspace, limit]
            library.call("run_transform_input", guarded(x), n, 2, n, 0, *transform, *outputs, options=options)
            codes = (256 * y.array.astype(np.int64) + low.array).reshape(2, -1, 4)[:, :, [0, 2, 1, 3]].reshape(2, n)
            np.testing.assert_array_equal(total.array, codes.sum(1), err_msg=f"sum differs, {options}")
            got = codes / 256 * scale.array[:, None].astype(np.float64)
            worst = np.abs(want).max(1) / 32512
            np.testing.assert_array_less(np.abs(got - want).max(1), worst, err_msg=f"differs, {options}, {limit}")
