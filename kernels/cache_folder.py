"""Where what was measured on this machine's GPUs is kept: BITPALETTE_CACHE, or bitpalette in the user's caches."""

from __future__ import annotations

import os
import re
from pathlib import Path

CACHE_VARIABLE = "BITPALETTE_CACHE"


def cache_folder() -> Path:
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bitpalette")
    return Path(folder)


def device_slug(device_name: str) -> str:
    """A GPU's name as part of a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
