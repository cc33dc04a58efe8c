"""Which kernel was fastest on this GPU: times that `quantize bench kernels --device cuda --store` measured, in a file.

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "times": {KEY: {TOKENS: {NAME: microseconds}}}}

KEY is of a scheme and a shape, TOKENS one of CLASSES, NAME a kernel's or `dequantize`: written out, then cuBLAS. What
was not measured is chosen by rank, as without a file; nothing is taken over from another shape or another GPU.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..quant.scheme import Scheme
from .cache_folder import cache_folder, device_slug

FORMAT = 1
CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of tokens: a class reaches from the one before it, and the last takes all beyond."""

DEQUANTIZE = "dequantize"

Times = dict[str, dict[str, dict[str, float]]]


def token_class(tokens: int) -> int:
    return next((most for most in CLASSES if tokens <= most), CLASSES[-1])


def choice_file(device_name: str) -> Path:
    return cache_folder() / f"choose-{device_slug(device_name)}.json"


def choice_key(scheme: Scheme, shape: tuple[int, int]) -> str:
    """Of a scheme, its transforms apart, which are the layer's, and a shape."""
    return f"{json.dumps(scheme.replace(transforms=()).to_dict(), sort_keys=True)} {shape[0]}x{shape[1]}"


def measured_times(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> dict[int, dict[str, float]]:
    """{tokens: {name: microseconds}} measured on this kind of GPU; empty where nothing was."""
    if device.type != "cuda":
        return {}
    times = _table(choice_file(_device_name(device))).get(choice_key(scheme, shape), {})
    return {int(tokens): dict(names) for tokens, names in times.items()}


def fastest(scheme: Scheme, shape: tuple[int, int], device: torch.device, tokens: int) -> str | None:
    """The fastest name for so many tokens, `dequantize` among them; None where it was not measured."""
    names = measured_times(scheme, shape, device).get(token_class(tokens), {})
    return min(names, key=lambda name: names[name]) if names else None


def most_tokens(scheme: Scheme, shape: tuple[int, int], device: torch.device, name: str, most: int) -> int:
    """Up to how many tokens, at most `most`, the kernel `name` is to multiply by the codes: beyond, writing the weight
    out was faster in every class that was measured. `most` where nothing was."""
    times = measured_times(scheme, shape, device)
    for tokens in sorted((t for t in times if t <= most), reverse=True):
        names = times[tokens]
        if name not in names or not names.get(DEQUANTIZE, math.inf) < names[name]:
            break
        most = max((c for c in CLASSES if c < tokens), default=0)
    return most


def measured_order(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> dict[str, int]:
    """{name: place}, fastest first, of what was measured at every token class that the file has; empty where none was.

    A layer has one kernel for all numbers of tokens: names are ordered by the geometric mean of their times, in which
    no class outweighs the others.
    """
    classes = list(measured_times(scheme, shape, device).values())
    names = set.intersection(*(set(names) for names in classes)) if classes else set()
    means = {name: sum(math.log(times[name]) for times in classes) for name in sorted(names)}
    return {name: place for place, name in enumerate(sorted(means, key=lambda name: means[name]))}


def store_times(device_name: str, measured: Mapping[tuple[str, int], Mapping[str, float]]) -> Path:
    """Add {(key, tokens): {name: microseconds}} to the file of a GPU, in place of what it has of them; its path.

    OSError where the folder cannot be written.
    """
    path = choice_file(device_name)
    times: Times = {key: {t: dict(names) for t, names in of_key.items()} for key, of_key in _table(path).items()}
    for (key, tokens), names in measured.items():
        times.setdefault(key, {})[str(token_class(tokens))] = dict(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "device": device_name, "times": times}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(content, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _read.cache_clear()
    return path


def _table(path: Path) -> Times:
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(path, changed)


@cache
def _read(path: Path, changed: int) -> Times:
    """The times in a file; none, and a line on stderr, where it is damaged or of another format."""
    try:
        content: Any = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        times: Times = content["times"]
        for of_key in times.values():
            for tokens, names in of_key.items():
                if int(tokens) not in CLASSES or not all(0 < float(us) < math.inf for us in names.values()):
                    raise ValueError(f"no times of kernels at {tokens} tokens: {names}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        print(f"bitpalette: kernels are chosen by rank, {path} is unreadable ({reason}): delete it", file=sys.stderr)
        return {}
    return times


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
