"""kv_attention of few tokens over pages, sinks, window and fresh tokens, against float64 on the decoded values."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
RACE = "data race"
WRONG = "differs"

MUTATIONS = {
    "kv_wait_off_by_one": {"plain": WRONG, "tsan": RACE},
    "kv_missing_sync_warp": {"plain": WRONG, "tsan": RACE},
    "kv_missing_barrier": {"plain": WRONG, "tsan": RACE},
    "kv_sees_the_next": {"plain": WRONG},
    "kv_unit_is_forgotten": {"plain": WRONG},
}


def cases() -> ModuleType:
    """kv_case.py, which cannot be imported by name: these files are no package."""
    path = HERE / "kv_case.py"
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


def check(executor: Any, defines: list[str]) -> None:
    kv = cases()
    library = executor.build([CUDA / "kv_attention.cu", HERE / "kv_one_entry.cpp"], defines=defines)
    # 3 splits of pages: 12 warps, 40 half pages
    many = kv.Shape(group=3, tokens=2, lengths=(1270, 65), splits=4)
    few = kv.Shape(group=3, tokens=2, kv_heads=1, lengths=(330,), splits=2)
    for shape in (many, few) if executor.mode == "plain" else (few,):
        cache = kv.Cache(shape)
        want, before = cache.want(), None
        for options in executor.all_options():
            out = cache.run(executor, library, options)
            assert (kv.error(out, want) <= 1e-3).all(), f"differs by {kv.error(out, want).max()}, {options}, {shape}"
            assert before is None or torch.equal(out, before), f"differs from the order before, {options}"
            before = out
