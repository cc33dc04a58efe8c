"""What a kernel with BP_MUTATE has beside it (test_mutations.py): how it is checked, and who catches which bug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DEMO = Path(__file__).with_name("demo.cu")
RACE = "data race"
WRONG = "Mismatch|Not equal|differs"

# mutation -> {mode: what is said}. "plain" is check() below without one.
MUTATIONS = {
    "missing_barrier": {"plain": WRONG, "tsan": RACE},
    "wait_off_by_one": {"plain": WRONG, "tsan": RACE},
    "prefetch_onto_live_stage": {"plain": WRONG, "tsan": RACE},
    "early_reuse": {"plain": WRONG, "tsan": RACE},
    "unsynchronized_sum": {"plain": WRONG, "tsan": RACE},
    "swapped_fragment": {"plain": WRONG},
    "unguarded_edge": {"plain": "bytes written behind a buffer", "asan": "heap-buffer-overflow"},
    "unguarded_load": {"asan": "heap-buffer-overflow"},
    "unswizzled": {"plain": "bank conflicts"},
}


def check(executor: Any, defines: list[str]) -> None:
    """Raises if the kernel is wrong: against float64, in every order, copies late and early; and its banks."""
    library = executor.build([DEMO], defines=defines)
    rng = np.random.default_rng(0)
    for n, k in (
        [(37, 264), (16, 64), (1, 8)] if executor.mode == "plain" else [(17, 248)]
    ):  # 4 tiles, the first and the last in one stage
        w, x = (rng.standard_normal((rows, k)).astype(np.float16) for rows in (n, 8))
        exact = w.astype(np.float64) @ x.astype(np.float64).T
        for options in executor.all_options(coresident=2):
            y = executor.guarded(np.full((n, 8), np.nan, np.float32))
            library.call("run_demo", executor.guarded(w), executor.guarded(x), y, n, k, options=options)
            np.testing.assert_allclose(y.array, exact, rtol=0, atol=1e-5 * k, err_msg=f"differs, {options}")
    library.call("run_demo", *map(executor.guarded, (w, x, y.array)), n, k, options=executor.Options(conflicts=True))
    extra = {line: passes for line, (_, passes) in library.conflicts().items() if passes}
    if extra:
        raise AssertionError(f"bank conflicts: {extra}")
