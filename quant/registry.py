"""Codecs, solvers and transforms are found by name: a module of this package that sets CODEC, SOLVER or TRANSFORM."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any


@cache
def registered(marker: str) -> dict[str, Any]:
    """{name: object} of every module in this folder that has the module-level attribute `marker`."""
    package = __name__.rpartition(".")[0]
    found = {}
    for info in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda i: i.name):
        entry = getattr(importlib.import_module(f"{package}.{info.name}"), marker, None)
        if entry is not None:
            found[entry.name] = entry
    return found
