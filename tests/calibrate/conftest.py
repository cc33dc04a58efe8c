"""Small compilations of the tiny models, with little text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpalette.calibrate.compile import Compilation
from bitpalette.calibrate.plan import Plan
from bitpalette.calibrate.text import Calibration
from bitpalette.formats.base import open_source
from bitpalette.recipe import make_plan

SEQ_LEN = 32


@pytest.fixture
def compilation() -> Callable[..., Compilation]:
    """compilation(model, out, sequences=4, max_shard_bytes=..., work=..., **options of make_plan or plan=Plan)."""

    def make(
        model: Path, out: Path, *, sequences: int = 4, text: str = "builtin", plan: Plan | None = None, **options: Any
    ) -> Compilation:
        own = {
            k: options.pop(k) for k in ("max_shard_bytes", "work", "stats", "dtype", "device", "events") if k in options
        }
        return Compilation(
            open_source(model),
            plan or make_plan(**({"group_size": 16} | options)),
            out,
            calibration=Calibration(text, SEQ_LEN * sequences, SEQ_LEN, 0),
            version="0",
            **own,
        )

    return make


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """tree(folder) -> {path: content} of everything below it, None for folders."""

    def read(folder: Path) -> dict[str, bytes | None]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}

    return read
