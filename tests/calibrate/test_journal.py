"""What a killed run leaves, and what a later one makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.calibrate import journal as journals
from bitpalette.calibrate.journal import Journal
from bitpalette.calibrate.undo import Created
from bitpalette.formats.errors import FormatError

JOB: dict[str, Any] = {"model": "abc", "plan": {"seed": 0, "linear": {"codec": "int"}}}


def test_parts(tmp_path: Path) -> None:
    work = tmp_path / "a" / "work"
    first = Journal(work, JOB)
    assert not first.resumed and first.parts == []
    first.add({"part": 0})
    first.add({"part": 1, "layers": [{"error": 0.1 + 0.2}]})
    again = Journal(work, JOB)
    assert again.resumed and again.parts == first.parts
    assert again.parts[1]["layers"][0]["error"] == 0.1 + 0.2


@pytest.mark.parametrize("torn", [b"{", b'{"part": 2}', b'{"part": 2, "layers": ['])
def test_a_torn_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    Journal(tmp_path, JOB).add({"part": 0})
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(torn)
    again = Journal(tmp_path, JOB)
    assert again.parts == [{"part": 0}]
    again.add({"part": 1})
    assert Journal(tmp_path, JOB).parts == [{"part": 0}, {"part": 1}]


def test_another_job(tmp_path: Path) -> None:
    Journal(tmp_path, JOB)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(FormatError, match=r"other settings \(plan.seed: 0 then, 1 now\)"):
        Journal(tmp_path, JOB | {"plan": {"seed": 1, "linear": {"codec": "int"}}})
    with pytest.raises(FormatError, match=r"\(model: \"abc\" then, null now\)"):
        Journal(tmp_path, {"plan": JOB["plan"]})
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Journal(tmp_path, JOB)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot be made"):
        Journal(tmp_path / "file" / "work", JOB)


def test_tokens(tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB)
    assert journal.tokens() is None
    tokens = torch.arange(12).view(3, 4)
    journal.save_tokens(tokens)
    kept = Journal(tmp_path, JOB).tokens()
    assert kept is not None and torch.equal(kept, tokens) and kept.dtype == torch.int64


def test_hidden_states(tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB)
    assert journal.hidden(0) is None
    for block in (1, 3, 12):
        hidden = [torch.full((2, 3, 5), block + i, dtype=torch.bfloat16) for i in range(11)]
        hidden[-1] = hidden[-1][:1]  # a smaller last batch
        journal.save_hidden(block, hidden, 0.0)
        assert len(list(tmp_path.glob("hidden-*"))) == 1
    kept = Journal(tmp_path, JOB).hidden(12)
    assert kept is not None and kept[0] == 12
    assert [h.shape[0] for h in kept[1]] == [2] * 10 + [1]
    assert all(torch.equal(h, torch.full_like(h, 12 + i)) and h.dtype == torch.bfloat16 for i, h in enumerate(kept[1]))
    assert journal.hidden(11) is None  # of a later block: of no use


def test_hidden_states_lie_as_fresh_ones_do(tmp_path: Path) -> None:
    """Matrix products may round otherwise on memory at odd addresses, such as that of a mapped file."""
    journal = Journal(tmp_path, JOB)
    journal.save_hidden(1, [torch.randn(1, 3, 5) for _ in range(7)], 0.0)
    kept = journal.hidden(1)
    assert kept is not None and all(h.data_ptr() % 64 == torch.empty(15).data_ptr() % 64 for h in kept[1])


def test_hidden_states_are_not_kept_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(journals.time, "monotonic", lambda: now)
    journal = Journal(tmp_path, JOB)
    kept = []
    for block, now in enumerate((110.0, 119.0, 121.0, 130.0, 142.0), start=1):  # noqa: B007
        journal.save_hidden(block, [torch.zeros(1)], 20.0)
        kept.append(sorted(p.name for p in tmp_path.glob("hidden-*")))
    name = "hidden-0000{}.safetensors".format
    assert kept == [[], [], [name(3)], [name(3)], [name(5)]]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, JOB)
    journal.save_hidden(1, [torch.zeros(3)], 0.0)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(FormatError, match=r"hidden-00002.safetensors: cannot be written: .*No space"):
            journal.save_hidden(2, [torch.ones(3)], 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hidden-00001.safetensors", "job.json"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FormatError, match="No space left on device") as caught:
            journal.add({"part": 0})
    assert isinstance(caught.value.__cause__, OSError)


def test_remove(tmp_path: Path) -> None:
    work = tmp_path / "work"
    journal = Journal(work, JOB)
    journal.add({"part": 0})
    journal.save_hidden(1, [torch.zeros(3)], 0.0)
    (work / "tokens.safetensors.partial").write_bytes(b"")
    journal.remove()
    assert not work.exists() and tmp_path.exists()


def test_created(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    new = tmp_path / "a" / "b"
    created = Created(new / "out", there)
    for folder in (new / "out" / "deep", there / "deep"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (there / "link").symlink_to(tmp_path)
    (tmp_path / "a" / "other").write_text("not ours")
    created.remove()
    assert list(there.iterdir()) == []
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["other"]
    created.remove()  # nothing left to do
