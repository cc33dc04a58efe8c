"""How a checkpoint is made again: Python, from the job in its report, or the command that was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import Calibration

REPORT = "quantization_report.json"
"""File beside the weights: the job that made them, and a record for every quantized weight."""


def reproduction(job: Mapping[str, Any]) -> str:
    """Lines of Python that make the checkpoint of a `job` of quantization_report.json again, byte for byte where they
    run on the same machine and versions. MODEL, OUT and texts other than the built-in one stand for what the job does
    not know."""
    arguments = ['"MODEL"', '"OUT"', 'job["plan"]']
    values = job.get("calibration")
    if isinstance(values, Mapping):
        text = _text(values)
        arguments.append(
            f'calibration=bitpalette.Calibration("{text}", {values.get("tokens")}, {values.get("seq_len")}, '
            f"{values.get('seed')})"
        )
    if job.get("stats") == "of the original model":
        arguments.append('stats="STATS"')
    arguments += [
        f"{name}={job[name]!r}" for name, usual in _USUAL.items() if job.get(name) is not None and job[name] != usual
    ]
    return (
        "import json, bitpalette\n\n"
        f'job = json.load(open("{REPORT}"))["job"]\n'
        f"bitpalette.compile_checkpoint({', '.join(arguments)})"
    )


_USUAL = {"dtype": "float32", "device": "cpu", "tune_seconds": None, "max_shard_bytes": 5_000_000_000}
"""Options of compile_checkpoint that are left out where they are what they are anyway."""


def calibration_text(values: Mapping[str, Any] | None) -> str:
    """A job's "calibration" in words."""
    if not values:
        return "none: the rounding needs no statistics"
    text = _text(values)
    name = {
        "builtin": "the built-in text (topics of Python's pydoc)",
        "self": "text that the model wrote itself",
        "TEXT": f"a file of the user's (fingerprint {str(values.get('text'))[:12]})",
    }[text]
    return f"{name}, {values.get('tokens'):,} tokens in sequences of {values.get('seq_len')}"


def _text(values: Mapping[str, Any]) -> str:
    """ "builtin" or "self" where the fingerprint is theirs, else "TEXT": a job does not keep paths of files."""
    try:
        numbers = (int(values["tokens"]), int(values["seq_len"]), int(values["seed"]))
        same = (name for name in ("builtin", "self") if Calibration(name, *numbers).fingerprint() == values["text"])
        return next(same, "TEXT")
    except (KeyError, TypeError, ValueError):
        return "TEXT"
