"""Calibration text: where sequences begin, what the fingerprint covers, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.calibrate.text import (
    Calibration,
    CalibrationError,
    builtin_text,
    check_length,
    read_text,
    self_written,
    sequences,
    tokenize,
)
from bitpalette.calibrate.whole import load_model, load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError


class Letters:
    """A token a character."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(i) for i in range(300, 400)))  # its tokens are their positions + 300
    return path


@pytest.mark.parametrize(
    ("tokens", "length", "starts"),
    [
        (30, 10, [0, 45, 90]),
        (100, 10, list(range(0, 100, 10))),
        (100, 100, [0]),
        (10, 10, [0]),
        (39, 10, [0, 45, 90]),  # what is left over makes no sequence
        (66, 33, [0, 67]),
    ],
)
def test_evenly_spaced(text: Path, tokens: int, length: int, starts: list[int]) -> None:
    got = sequences(Calibration(str(text), tokens, length), Letters())
    assert got.dtype == torch.int64
    want = torch.tensor(starts)[:, None] + torch.arange(length) + 300
    assert torch.equal(got, want)


def test_as_often_as_asked(text: Path) -> None:
    a = sequences(Calibration(str(text), 60, 20), Letters())
    assert torch.equal(a, sequences(Calibration(str(text), 60, 20, seed=5), Letters()))  # the seed is that of "self"


def test_builtin() -> None:
    text = builtin_text()
    assert len(text) > 300_000 and text == builtin_text()
    assert "statement" in text
    assert sequences(Calibration("builtin", 64, 32), Letters()).shape == (2, 32)


def test_fingerprint(text: Path) -> None:
    base = Calibration(str(text), 60, 20, 0)
    seen = {base.fingerprint()}
    assert base.fingerprint() == Calibration(str(text), 60, 20, 0).fingerprint()
    copy = text.with_name("copy.txt")
    copy.write_bytes(text.read_bytes())
    assert Calibration(str(copy), 60, 20, 0).fingerprint() == base.fingerprint()  # what it says, not where it lies
    for other in (
        Calibration(str(text), 80, 20, 0),
        Calibration(str(text), 60, 10, 0),
        Calibration(str(text), 60, 20, 1),
        Calibration("builtin", 60, 20, 0),
        Calibration("self", 60, 20, 0),
    ):
        seen.add(other.fingerprint())
    text.write_text(text.read_text() + ".")
    seen.add(base.fingerprint())
    assert len(seen) == 7


def test_too_little(text: Path) -> None:
    with pytest.raises(CalibrationError, match=r"100 tokens, 120 were asked for; .* --calib-tokens 100$"):
        sequences(Calibration(str(text), 120, 20), Letters())
    with pytest.raises(CalibrationError, match=r"100 tokens, 200 were asked for; .*--seq-len 50$"):
        sequences(Calibration(str(text), 200, 200), Letters())
    for tokens, length, message in ((64, 7, "too short"), (31, 32, "less than one sequence"), (-1, 8, "less than")):
        with pytest.raises(CalibrationError, match=message):
            Calibration(str(text), tokens, length)


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for content, message in ((b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "cannot be read as text")):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=message):
            read_text(str(path))
        with pytest.raises(CalibrationError, match=message):
            Calibration(str(path)).fingerprint()
    with pytest.raises(CalibrationError, match="No such file"):
        read_text(str(tmp_path / "nothing"))


def test_no_special_tokens(checkpoint: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(open_source(checkpoint("llama")))
    ids = tokenize(tokenizer, "some text, longer than the model's positions " * 9)
    assert ids.dtype == torch.int64 and int(ids.min()) > 3
    assert tokenizer.decode(ids).startswith("some text")


def test_self_written(checkpoint: Callable[..., Path]) -> None:
    model = load_model(open_source(checkpoint("llama")), torch.float32)
    a = self_written(Calibration("self", 20 * 24, 24, seed=3), model)
    assert a.shape == (20, 24) and a.dtype == torch.int64
    assert int(a.min()) >= 0 and int(a.max()) < 203
    assert torch.equal(a, self_written(Calibration("self", 20 * 24, 24, seed=3), model))
    b = self_written(Calibration("self", 20 * 24, 24, seed=4), model)
    assert not torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1:], b[:, 1:])
    assert len(set(a.flatten().tolist())) > 100  # sampled, no loop of the likeliest


def test_an_encoder_writes_nothing(checkpoint: Callable[..., Path]) -> None:
    model = load_model(open_source(checkpoint("bert")), torch.float32)
    with pytest.raises(CalibrationError, match="BertForMaskedLM does not write text"):
        self_written(Calibration("self", 64, 32), model)


def test_compiled_on_its_own_text(checkpoint: Callable[..., Path], compilation: Any) -> None:
    path = checkpoint("llama")
    records = compilation(path, path.parent / "a", text="self").run()
    assert records[0].tokens == 128
    assert compilation(path, path.parent / "b", text="self").run() == records
    assert compilation(path, path.parent / "c").run() != records


def test_length_of_sequences(tmp_path: Path) -> None:
    check_length(128, 128, tmp_path)
    check_length(10**6, None, tmp_path)
    with pytest.raises(
        CalibrationError, match=r"129 tokens are longer than the 128 positions of .*; give --seq-len 128"
    ):
        check_length(129, 128, tmp_path)


def test_tokenizer_that_is_none(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="no tokenizer can be made"):
        load_tokenizer(open_source(path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(FormatError, match="has no tokenizer"):
        load_tokenizer(open_source(path))
