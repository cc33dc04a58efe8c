"""Launches that were timed on this GPU, kept in a file: BITPALETTE_CACHE, or bitpalette in the user's cache folder.

A file for each kind of GPU, version of Triton and text of the device code: a changed kernel is timed again. Files are
written beside their place and renamed; two processes that tune at once may each lose what the other found, and time it
again later.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from .cache_folder import cache_folder, device_slug
from .triton_launch import INTERPRETED, Launch, Problem, candidates, default_launch
from .triton_runtime import interpreting

TUNE_VARIABLE = "BITPALETTE_TRITON_TUNE"

Run = Callable[[Launch], object]

_chosen: dict[tuple[str, str], Launch] = {}


def launch_for(problem: Problem, device: torch.device, run: Run) -> Launch:
    """The launch of a problem: as it was tuned, or tuned now by timing `run` with each candidate.

    BITPALETTE_TRITON_TUNE=0, or a stream that is being captured: what the file has, else the default.
    """
    if interpreting():
        return INTERPRETED
    name = torch.cuda.get_device_name(device)
    known = _chosen.get((name, problem.key()))
    if known is not None:
        return known
    stored = _stored(cache_file(name)).get(problem.key())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if stored is None:
        if os.environ.get(TUNE_VARIABLE) == "0" or torch.cuda.is_current_stream_capturing():
            return default_launch(problem, processors)
        stored = tune(problem, candidates(problem, processors), run)
        _store(cache_file(name), problem.key(), stored)
    _chosen[name, problem.key()] = stored
    return stored


def tune(problem: Problem, launches: list[Launch], run: Run) -> Launch:
    """The fastest of `launches` by median. RuntimeError where none fits the GPU."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Launch, float] = {}
    reasons = []
    for launch in launches:
        try:
            times[launch] = do_bench(lambda launch=launch: run(launch), warmup=5, rep=20, return_mode="median")
        except OutOfResources as error:
            reasons.append(f"{launch}: {error}")
    if not times:
        raise RuntimeError(f"no launch of {problem.key()} fits this GPU: {'; '.join(reasons)}; use another kernel")
    return min(times, key=lambda launch: times[launch])


def cache_file(device_name: str) -> Path:
    """Where launches for GPUs of this name are kept."""
    return cache_folder() / f"triton-{device_slug(device_name)}-{_source_hash()}.json"


@cache
def _source_hash() -> str:
    import triton

    text = hashlib.sha256(triton.__version__.encode())
    for path in sorted((Path(__file__).parent / "triton_device").glob("*.py")):
        text.update(path.read_bytes())
    return text.hexdigest()[:12]


def _stored(path: Path) -> dict[str, Launch]:
    """What the file has; nothing where it is missing or unreadable: launches are then timed again."""
    try:
        return {key: Launch(**values) for key, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _store(path: Path, key: str, launch: Launch) -> None:
    """Add one launch to the file. A folder that cannot be written is no error: the next process times it again."""
    table = {name: asdict(known) for name, known in _stored(path).items()} | {key: asdict(launch)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(table, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return
