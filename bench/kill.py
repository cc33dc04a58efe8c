"""Kill a run with SIGKILL at random moments, start it again each time, compare the result with an undisturbed run.

    python bench/kill.py MODEL [--times 10] [--seed 0] [--kills 1] [-- options of quantize run]

One line for each round: when the kills came (seconds after the output folder appeared), what the run had finished by
then, and whether every byte of the output is the same. Exit code 1 where one differs.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[str, typer.Argument(help="What `quantize run` takes.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of `quantize run`, after --.")] = None,
    times: Annotated[int, typer.Option(help="Rounds.")] = 10,
    kills: Annotated[int, typer.Option(help="Kills in a round.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "out"
        started, log = start(model, whole, options), Path(folder) / "log"
        lasts = follow(started, whole, None)
        if started.returncode:
            raise SystemExit(f"the undisturbed run failed with exit code {started.returncode}")
        want = digest(whole)
        print(f"undisturbed: {lasts:.1f} s from the first file to the end, {len(want)} files", flush=True)
        bad = 0
        for number in range(1, times + 1):
            moments, seen = [], []
            for _ in range(kills):
                moment = draw.uniform(0, lasts)
                process = start(model, out, options)
                follow(process, out, moment)
                moments.append(
                    f"{moment:.2f} s" if process.returncode == -signal.SIGKILL else f"{moment:.2f} s (too late)"
                )
                seen.append(state(out))
            with open(log, "w") as file:
                last = start(model, out, options, file)
                last.wait()
            same = last.returncode == 0 and digest(out) == want
            bad += not same
            result = "identical" if same else f"DIFFERENT (exit code {last.returncode})"
            print(f"round {number}: killed at {', '.join(moments)}; {'; '.join(seen)}; {result}", flush=True)
            shutil.rmtree(out)
    raise SystemExit(1 if bad else 0)


def start(
    model: str, out: Path, options: list[str] | None, log: object = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bitpalette", "run", model, str(out), *(options or [])]
    return subprocess.Popen(command, stdout=log, stderr=log)  # type: ignore[call-overload,no-any-return]


def follow(process: subprocess.Popen[bytes], out: Path, moment: float | None) -> float:
    """Wait for the end, or kill `moment` seconds after `out` appeared. Seconds from then until `out` was complete."""
    while not out.exists() and process.poll() is None:
        time.sleep(0.001)
    began = complete = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if moment is not None and now - began >= moment:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if (out / ".bitpalette").exists() or not (out / "manifest.json").exists():
            complete = now
        time.sleep(0.001)
    return complete - began


def state(out: Path) -> str:
    """How far a run got, by what lies in its folder."""
    if (out / "manifest.json").exists():
        return "complete"
    journal = out / ".bitpalette" / "journal.jsonl"
    parts = journal.read_bytes().count(b"\n") if journal.exists() else 0
    hidden = ", hidden states kept" if list(out.glob(".bitpalette/hidden-*.safetensors")) else ""
    return f"{parts} parts finished{hidden}"


def digest(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file, hidden ones too."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


if __name__ == "__main__":
    typer.run(main)
