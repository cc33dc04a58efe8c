"""A run that is killed, at any moment, and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.calibrate import compile as finishing
from bitpalette.calibrate import run as compiling
from bitpalette.calibrate.compile import Compilation
from bitpalette.calibrate.journal import Journal
from bitpalette.formats import shards, sidecar
from bitpalette.formats.errors import FormatError

Make = Callable[..., Compilation]
Tree = Callable[[Path], dict[str, "bytes | None"]]


class Killed(BaseException):
    """As a signal: nothing in the product catches it."""


class Fuse:
    """Counts calls of some functions; `at` the n-th (from 1) it goes off, before or after the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *targets: tuple[Any, str]) -> None:
        self.calls, self.at, self.after = 0, 0, False
        for owner, name in targets:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            due = self.calls == self.at
            if due and not self.after:
                raise Killed
            result = function(*args, **kwargs)
            if due:
                raise Killed
            return result

        return call

    def set(self, at: int, after: bool = False) -> None:
        self.calls, self.at, self.after = 0, at, after


def killed(run: Compilation) -> None:
    with pytest.raises(Killed):
        run.run()


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama")


def test_after_every_part(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = model.parent / "out", model.parent / "whole"
    records = compilation(model, whole).run()
    want = tree(whole)
    fuse = Fuse(monkeypatch, (Journal, "add"))
    for k, after in ((1, True), (2, False), (2, True), (3, True)):  # two blocks, and what stands outside
        fuse.set(k, after)
        killed(compilation(model, out))
        assert (out / ".bitpalette").exists() and not (out / "manifest.json").exists()
        fuse.set(0)
        assert compilation(model, out).run() == records
        assert tree(out) == want, (k, after)
        shutil.rmtree(out)


def test_at_every_write(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """At tensors, renames, deletions, from the first folder made to the last removed; each third, for time."""
    out, whole = model.parent / "out", model.parent / "whole"
    options: dict[str, Any] = {"solver": "rtn", "max_shard_bytes": 60_000}
    compilation(model, whole, **options).run()
    want = tree(whole)
    fuse = Fuse(
        monkeypatch,
        (shards.ShardWriter, "write"),
        (os, "replace"),
        (os, "posix_fallocate"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (finishing, "write_manifest"),
        (sidecar, "copy_atomically"),
    )
    fuse.set(0)
    compilation(model, out, **options).run()
    steps = fuse.calls
    assert steps > 60
    shutil.rmtree(out)
    for k in range(1, steps + 1, 3):
        fuse.set(k, after=k % 2 == 0)
        killed(compilation(model, out, **options))
        fuse.set(0)
        compilation(model, out, **options).run()
        assert tree(out) == want, k
        shutil.rmtree(out)


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["kept", "computed again"])
def test_hidden_states(
    every: float, model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they come from disk or from the finished blocks, the next block sees the same."""
    out, whole = model.parent / "out", model.parent / "whole"
    compilation(model, whole).run()
    monkeypatch.setattr(compiling, "HIDDEN_EVERY", every)
    blocks: list[int] = []
    advance = compiling.Run._advance

    def watched(self: Any, index: int) -> None:
        blocks.append(index)
        advance(self, index)

    monkeypatch.setattr(compiling.Run, "_advance", watched)
    fuse = Fuse(monkeypatch, (shards.ShardWriter, "sync"))
    fuse.set(3)  # in the last part
    killed(compilation(model, out))
    assert len(list((out / ".bitpalette").glob("hidden-*"))) == (every == 0)
    fuse.set(0)
    blocks.clear()
    compilation(model, out).run()
    assert blocks == ([] if every == 0 else [0, 1])
    assert tree(out) == tree(whole)


def test_killed_again_and_again(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = model.parent / "out", model.parent / "whole"
    fuse = Fuse(monkeypatch, (shards.ShardWriter, "write"))
    compilation(model, whole).run()
    enough, kills = fuse.calls // 2 + 1, 0  # for one of the two blocks, not for both
    while True:
        fuse.set(enough)
        try:
            compilation(model, out).run()
            break
        except Killed:
            kills += 1
            assert kills < 20
    assert kills >= 2
    assert tree(out) == tree(whole)


def test_torn_write(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a tensor, and half a line of the journal."""
    out, whole = model.parent / "out", model.parent / "whole"
    compilation(model, whole).run()
    fuse = Fuse(monkeypatch, (Journal, "add"))
    fuse.set(2)
    killed(compilation(model, out))
    with open(out / ".bitpalette" / "journal.jsonl", "ab") as file:
        file.write(b'{"part": 1, "layers": [{"param')
    partial = out / "model.safetensors.partial"
    slot = compilation(model, out).shards.slots["model.layers.1.mlp.up_proj.weight"]
    with open(partial, "r+b") as file:
        file.seek(slot.offset)
        file.write(b"\xff" * (slot.nbytes // 2))
    fuse.set(0)
    compilation(model, out).run()
    assert tree(out) == tree(whole)


def test_work_elsewhere(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole, work = (model.parent / name for name in ("out", "whole", "work"))
    compilation(model, whole).run()
    fuse = Fuse(monkeypatch, (Journal, "add"))
    fuse.set(2)
    killed(compilation(model, out, work=work))
    assert (work / "job.json").exists() and not (out / ".bitpalette").exists()
    fuse.set(0)
    before = tree(model.parent)
    with pytest.raises(FormatError, match=r"other settings .out: "):
        compilation(model, model.parent / "another", work=work).run()
    with pytest.raises(FormatError, match="is not empty"):
        compilation(model, out).run()
    assert tree(model.parent) == before
    compilation(model, out, work=work).run()
    assert tree(out) == tree(whole) and not work.exists()


def test_bad_input_found_late(model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this run created is taken back; what was there before is not."""
    fuse = Fuse(monkeypatch)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise FormatError("bad")

    monkeypatch.setattr(compiling.Run, "_outside", fuse.wrapped(broken))
    (model.parent / "empty").mkdir()
    before = tree(model.parent)
    for out in (model.parent / "a" / "b", model.parent / "empty"):
        for work in (None, model.parent / "c" / "work"):
            with pytest.raises(FormatError, match="bad"):
                compilation(model, out, work=work).run()
            assert tree(model.parent) == before


def test_the_state_of_an_interrupted_run_is_not_taken_back(
    model: Path, compilation: Make, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = model.parent / "out"
    with monkeypatch.context() as patched:
        fuse = Fuse(patched, (Journal, "add"))
        fuse.set(2)
        killed(compilation(model, out))
    before = tree(out)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise FormatError("bad")

    with monkeypatch.context() as patched:
        patched.setattr(compiling.Run, "_block", broken)
        with pytest.raises(FormatError, match="bad"):
            compilation(model, out).run()
    assert tree(out) == before
    compilation(model, out).run()


COMMAND = ("--group-size", "16", "--calib-tokens", "4096", "--seq-len", "128", "--max-shard-size", "300kB")


def command(model: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "bitpalette", "run", str(model), str(out), *COMMAND]


def test_kill_9(families: Any, checkpoint: Any, tmp_path: Path, tree: Tree) -> None:
    """A process of its own, SIGKILL at random moments from its first file to its last."""
    import transformers

    model = checkpoint("llama")  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 6
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    start = time.monotonic()
    process = subprocess.Popen(
        command(model, whole), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    began = 0.0
    while process.poll() is None:
        began = began or (time.monotonic() if whole.exists() else 0.0)
        time.sleep(0.005)
    assert process.returncode == 0 and began > start
    lasts = time.monotonic() - began
    want = tree(whole)
    draw, interrupted = random.Random(9), 0
    for _ in range(2):  # bench/kill.py does more of them
        process = subprocess.Popen(
            command(model, out), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not out.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, lasts / 2))
        process.send_signal(signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
    assert interrupted >= 1
    done = subprocess.run(command(model, out), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(out) == want
