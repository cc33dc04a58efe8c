"""Native code under AddressSanitizer and UndefinedBehaviorSanitizer, and the pool of threads under ThreadSanitizer.

The programs are the .cpp files beside this one. They compare what they compute, too: "clean" is what they print last.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def run(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\n", ""), f"{done.stdout}\n{done.stderr[:5000]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("linear_memory", marks=pytest.mark.release), "vector_memory", "decoder_memory"]
)
def test_no_address_outside_and_nothing_undefined(name: str, sanitized: Callable[[str, str], Path]) -> None:
    run(sanitized("memory", name))


@pytest.mark.slow
def test_no_race(sanitized: Callable[[str, str], Path]) -> None:
    """The pool itself, and layers that several threads call at the same time."""
    run(sanitized("threads", "pool_threads"))
