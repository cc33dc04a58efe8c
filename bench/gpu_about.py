"""The GPU that figures were measured on, its driver and clocks, versions and the commit, as far as each is known."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "GIT_COMMIT"
COMMIT_FILE = "GIT_COMMIT"
"""For a tree that comes without .git: `git describe --always --dirty > GIT_COMMIT` before it is sent."""

QUERIES = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def commit() -> str:
    """GIT_COMMIT, else what git says, else the file GIT_COMMIT, else "unknown"."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    if (ROOT / ".git").exists():
        said = output("git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+changes")
        if said:
            return said
    try:
        return (ROOT / COMMIT_FILE).read_text().strip()
    except OSError:
        return "unknown"


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {"commit": commit(), "python": platform.python_version(), **versions()}
    values = output("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader", "-i", "0").split(", ")
    if len(values) == len(QUERIES):
        found["gpu"] = dict(zip(QUERIES, values, strict=True))
    nvcc = output("nvcc", "--version").splitlines()
    found["nvcc"] = nvcc[-1] if nvcc else None
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "cupy"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
