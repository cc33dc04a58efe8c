"""Every preset and effort through the command: compiled, told about, loaded, and close to the original."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitpalette
from bitpalette.cli import main
from bitpalette.recipe import PRESETS

SMALL = ("--calib-tokens", "256", "--seq-len", "32", "--head-bits", "16")


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama")


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
    code = main()
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, model: Path, monkeypatch, capsys) -> None:
    out = model.parent / "out"
    options = ("--preset", preset, "--bits", "4", *SMALL)
    code, _, told = call(monkeypatch, capsys, "run", model, out, *options)
    assert code == 0, told
    assert f"solver {PRESETS[preset].solver}: about " in told.splitlines()[0] and "on this machine" in told
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    packed = bitpalette.load(out, dtype=torch.float32)
    ids = torch.arange(40).view(1, 40) % 64
    with torch.no_grad():
        a, b = original(input_ids=ids).logits, packed(input_ids=ids).logits
    assert float((a - b).square().mean() / a.var()) < 0.1


def test_best_effort_tunes(model: Path, monkeypatch, capsys) -> None:
    out, plain = model.parent / "out", model.parent / "plain"
    options = ("--bits", "2", "--codec", "int", "--group-size", "16", "--calib-tokens", "512", "--seq-len", "32")
    assert call(monkeypatch, capsys, "run", model, plain, *options)[0] == 0
    code, _, told = call(monkeypatch, capsys, "run", model, out, *options, "--effort", "best")
    assert code == 0 and "then tuning: about" in told and "tuning scales and norms" in told
    tuning = json.loads((out / "quantization_report.json").read_text())["tuning"]
    assert tuning["kl_after"] < tuning["kl_before"]
    a, b = (bitpalette.load(folder, dtype=torch.float32) for folder in (plain, out))
    name = "model.layers.0.self_attn.q_proj"
    x, y = a.get_submodule(name).to_tensor(), b.get_submodule(name).to_tensor()
    assert torch.equal(x.fields["codes"], y.fields["codes"]) and not torch.equal(x.fields["scale"], y.fields["scale"])
    again = call(monkeypatch, capsys, "run", model, out, *options, "--effort", "best")
    assert again[0] == 0 and "complete already" in again[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "gguf"), "--preset is one of"),
        (("--preset", "nf4", "--bits", "3"), "--preset nf4 is for 4 bits"),
        (("--preset", "nf4", "--codec", "int"), "leave one of them out"),
        (("--preset", "awq", "--solver", "rtn"), "leave one of them out"),
        (("--effort", "heroic"), "--effort is one of"),
        (("--bits", "2.3", "--uniform"), "sixteenths"),
        (("--bits", "5.5", "--uniform"), "only codec trellis has fractions"),
        (("--codec", "int", "--bits", "2.5"), "only codec trellis has fractions"),
        (("--codec", "trellis", "--asymmetric"), "--asymmetric is of codec int"),
        (("--tune-minutes", "3"), "with --effort best"),
        (("--effort", "best", "--tune-minutes", "-1"), "minutes above 0"),
    ],
    ids=str,
)
def test_refused(options: tuple[str, ...], message: str, model: Path, monkeypatch, capsys) -> None:
    code, _, told = call(monkeypatch, capsys, "run", model, model.parent / "out", *options)
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1, told
    assert not (model.parent / "out").exists()
