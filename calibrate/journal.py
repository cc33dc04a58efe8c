"""What an interrupted compilation left behind, and whether it may be gone on with.

<work>/job.json         everything the result depends on: a run goes on only with the very same job
<work>/journal.jsonl    a line for each finished part, appended once its tensors are in the partial files
<work>/tokens.safetensors         the calibration set, int64 [sequences, seq_len]
<work>/hidden-NNNNN.safetensors   the calibration set's hidden states at the input of block NNNNN
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.atomic import PARTIAL, write_atomically
from ..formats.config_json import read_json
from ..formats.errors import FormatError

JOB = "job.json"
PARTS = "journal.jsonl"
FISHER = "fisher.safetensors"
TOKENS = "tokens.safetensors"


class Journal:
    """Opened on a work folder, which is made where there is none. resumed: a run was begun in it before.

    FormatError where the folder cannot be made, or belongs to a run of another job.
    """

    def __init__(self, work: Path, job: dict[str, Any]) -> None:
        self.work = work
        self.path = work / PARTS
        text = json.dumps(job, indent=1, sort_keys=True)
        stored = work / JOB
        self.resumed = stored.exists()
        if self.resumed:
            if stored.read_text() != text:
                changed = _difference(read_json(stored), job)
                raise FormatError(
                    f"{work} belongs to an unfinished run with other settings ({changed}); "
                    "run that command again to finish it, or delete the folder"
                )
        else:
            try:
                work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FormatError(f"{work}: cannot be made: {error.strerror}; choose another folder") from error
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
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(part).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be written: {error.strerror}; free space and run again") from error
        self.parts.append(part)

    def save_tokens(self, tokens: Tensor) -> None:
        """Keep the calibration set: a run that goes on need not make it again."""
        self._save(self.work / TOKENS, {"tokens": tokens})

    def tokens(self) -> Tensor | None:
        """The calibration set kept by the run that goes on here."""
        path = self.work / TOKENS
        return _load(path)["tokens"] if path.exists() else None

    def save_fisher(self, fisher: dict[str, Tensor]) -> None:
        """Keep the Fisher diagonals, by parameter."""
        self._save(self.work / FISHER, fisher)

    def has_fisher(self) -> bool:
        return (self.work / FISHER).exists()

    def fisher(self, name: str) -> Tensor:
        """That of one parameter, float32 [out, in]."""
        from safetensors import safe_open

        with safe_open(self.work / FISHER, "pt") as file:
            return file.get_tensor(name).clone()

    def save_hidden(self, block: int, hidden: list[Tensor], every: float) -> None:
        """Keep the hidden states at the input of `block`, unless some were kept within the last `every` seconds."""
        if time.monotonic() - self._saved < every:
            return
        path = self.work / f"hidden-{block:05d}.safetensors"
        self._save(path, {f"{i:06d}": h for i, h in enumerate(hidden)})
        for old in self.work.glob("hidden-*.safetensors"):
            if old != path:
                old.unlink()
        self._saved = time.monotonic()

    def hidden(self, block: int) -> tuple[int, list[Tensor]] | None:
        """(block, hidden states at its input), the latest kept at or before `block`."""
        kept = sorted(p for p in self.work.glob("hidden-*.safetensors") if int(p.stem[7:]) <= block)
        if not kept:
            return None
        tensors = _load(kept[-1])
        return int(kept[-1].stem[7:]), [tensors[k] for k in sorted(tensors)]

    def remove(self) -> None:
        """Delete the work folder. job.json goes last: a folder without one has nothing that a run needs."""
        for path in self.work.iterdir():
            if path.name != JOB:
                path.unlink()
        (self.work / JOB).unlink()
        self.work.rmdir()

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial = path.with_name(path.name + PARTIAL)
        try:
            save_file(tensors, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # the library wraps what the system says
            partial.unlink(missing_ok=True)
            raise FormatError(
                f"{path}: cannot be written: {error}; free space, or choose another folder by --work"
            ) from (error if isinstance(error, OSError) else OSError(str(error)))


def _load(path: Path) -> dict[str, Tensor]:
    """In fresh memory: tensors mapped from the file lie at odd addresses, for which sums may be rounded otherwise."""
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first value that differs, by its path."""
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            return f"{key}.{_difference(a, b)}"
        if a != b:
            return f"{key}: {json.dumps(a)[:80]} then, {json.dumps(b)[:80]} now"
    return "job"
