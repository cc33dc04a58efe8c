"""Kernels are found by name: a module of this folder that sets KERNEL."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Kernel


@cache
def kernels() -> dict[str, Kernel]:
    """{name: kernel} of every module in this folder with a `KERNEL`, fastest first."""
    package = __name__.rpartition(".")[0]
    found: list[Kernel] = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        kernel = getattr(importlib.import_module(f"{package}.{info.name}"), "KERNEL", None)
        if kernel is not None:
            found.append(kernel)
    return {kernel.name: kernel for kernel in sorted(found, key=lambda k: (k.rank, k.name))}
