"""What an interrupted compilation left behind, and whether it may be gone on with.

    <work>/job.json         everything the result depends on: a run goes on only with the very same job
    <work>/journal.jsonl    a line for each finished part, appended once its tensors are in the partial files
    <work>/hidden-NNNNN.safetensors   the calibration set's hidden states at the input of block NNNNN
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.atomic import write_atomically
from ..formats.errors import FormatError


class Journal:
    """Opened on a work folder; `create` says whether it is new."""

    def __init__(self, work: Path, job: dict[str, Any]) -> None:
        self.work = work
        self.path = work / "journal.jsonl"
        text = json.dumps(job, indent=1, sort_keys=True)
        stored = work / "job.json"
        self.resumed = stored.exists()
        if self.resumed:
            if stored.read_text() != text:
                changed = _difference(json.loads(stored.read_text()), job)
                raise FormatError(
                    f"{work} belongs to an unfinished run with other settings ({changed}); "
                    "run that command again to finish it, or delete the folder"
                )
        else:
            work.mkdir(parents=True, exist_ok=True)
            write_atomically(stored, text.encode())
        self.parts = self._read()
        self._saved = time.monotonic()

    def _read(self) -> list[dict[str, Any]]:
        """Finished parts in order; an unfinished last line, of a run that was killed while writing it, is cut off."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, part: dict[str, Any]) -> None:
        """Append a finished part; on disk when this returns."""
        with open(self.path, "ab") as file:
            file.write(json.dumps(part).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.parts.append(part)

    def save_hidden(self, block: int, hidden: list[Tensor], every: float) -> None:
        """Keep the hidden states at the input of `block`, unless some were kept within the last `every` seconds."""
        from safetensors.torch import save_file

        if time.monotonic() - self._saved < every:
            return
        path = self.work / f"hidden-{block:05d}.safetensors"
        save_file({f"{i:06d}": h for i, h in enumerate(hidden)}, str(path) + ".partial")
        os.replace(str(path) + ".partial", path)
        for old in self.work.glob("hidden-*.safetensors"):
            if old != path:
                old.unlink()
        self._saved = time.monotonic()

    def hidden(self, block: int) -> tuple[int, list[Tensor]] | None:
        """(block, hidden states at its input), the latest kept at or before `block`."""
        from safetensors.torch import load_file

        kept = sorted(p for p in self.work.glob("hidden-*.safetensors") if int(p.stem[7:]) <= block)
        if not kept:
            return None
        tensors = load_file(kept[-1])
        return int(kept[-1].stem[7:]), [tensors[k] for k in sorted(tensors)]

    def remove(self) -> None:
        shutil.rmtree(self.work)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            return f"{key}: {json.dumps(old.get(key))[:80]} then, {json.dumps(new.get(key))[:80]} now"
    return "job"
