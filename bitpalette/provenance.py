"""What a measurement was made on: the processor, its last-level cache, the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The model name of the CPU, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """The commit of the checkout this package runs from, "+changes" where files differ; None where installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def last_level_cache(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the last cache before memory, as Linux tells of the first CPU; None where it does not."""
    sizes = {}
    for index in caches.glob("index*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            sizes[level] = int(size.removesuffix("K")) << 10 if size.endswith("K") else int(size)
        except (OSError, ValueError):
            continue
    return sizes[max(sizes)] if sizes else None
