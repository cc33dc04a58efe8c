"""`quantize bench distortion`: what it prints and writes, and what it refuses in one line with exit code 2."""

from __future__ import annotations

import errno
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpalette.cli import main
from bitpalette.commands.bench import WEIGHTS
from bitpalette.quant.distortion import LEAST_WEIGHTS

SMALL = ("--codec", "int", "--weights", str(LEAST_WEIGHTS))

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments) -> code, out and err of `quantize bench distortion`, in this process."""

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", "bench", "distortion", *map(str, arguments)])
        code = main()
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def rows(shown: SimpleNamespace) -> dict[str, Any]:
    assert shown.code == 0, shown.err
    assert shown.err == "" and shown.out.count("\n") == 1
    return json.loads(shown.out)


def test_json(call: Call) -> None:
    told = rows(call(*SMALL, "--rate", "2", "--rate", "3", "--seed", "7", "--json"))
    assert set(told) == {"about", "rows", "published"}
    about = told["about"]
    assert about["weights"] == LEAST_WEIGHTS and about["batches"] == 2 and about["seed"] == 7
    assert about["threads"] == torch.get_num_threads()
    for key in ("device", "isa", "commit", "interval", "bitpalette"):
        assert key in about
    assert [r["rate"] for r in told["rows"]] == [2, 3]
    for row, bits in zip(told["rows"], (2, 3), strict=True):
        assert row["codec"] == "int" and row["scheme"] == {"codec": "int", "bits": bits, "group_size": 0}
        assert row["bound"] == 4.0**-bits < row["mse"] and row["ci95"] > 0
        assert row["stored_bits"] == round(bits + 16 / 4096, 6)
        assert row["gap_db"] == pytest.approx(10 * math.log10(row["mse"] / row["bound"]), abs=1e-4)
    assert [(p["rate"], p["mse"]) for p in told["published"]] == [(2, 0.0710), (3, 0.0189)]
    assert all(p["measured"] is False and "2509.20214" in p["source"] for p in told["published"])


def test_the_same_for_a_seed_whatever_the_threads(call: Call) -> None:
    threads = torch.get_num_threads()
    arguments = ("--rate", "2", "--weights", LEAST_WEIGHTS, "--window", "12", "--json")
    one, two, other = (rows(call(*arguments, "--threads", n, "--seed", seed)) for n, seed in ((1, 0), (2, 0), (1, 1)))
    assert torch.get_num_threads() == threads
    assert {r["codec"] for r in one["rows"]} >= {"int", "lut", "trellis"}
    assert (one["about"]["threads"], two["about"]["threads"]) == (1, 2)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["scheme"] == b["scheme"]
        assert a["mse"] == pytest.approx(b["mse"], rel=1e-9)  # sums in another order
    assert all(a["mse"] != b["mse"] for a, b in zip(one["rows"], other["rows"], strict=True))


def test_table(call: Call) -> None:
    shown = call(*SMALL, "--rate", "2", "--rate", "8")
    assert shown.code == 0 and shown.err == ""
    head, *lines = shown.out.splitlines()
    assert head.split() == [
        *["codec", "scheme", "bits", "stored", "bits", "mse", "±", "95", "%", "2^(-2R)", "gap", "dB"]
    ]
    assert lines[0].split()[:5] == ["int", "bits=2", "group_size=0", "2", "2.0039"]
    assert lines[1].split()[:5] == ["int", "bits=8", "group_size=0", "8", "8.0039"]
    published = next(line for line in lines if "Q-Palette" in line)
    assert "published" in published and "not measured" in published and "0.071" in published
    assert "131,072 weights in 2 batches" in shown.out


def test_student_t_where_scipy_is_installed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*SMALL, "--rate", "2", "--json")
    scipy = pytest.importorskip("scipy.stats")
    student = rows(call(*arguments))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    normal = rows(call(*arguments))
    assert student["about"]["interval"] == "Student t"
    assert normal["about"]["interval"] == "normal (scipy is not installed)"
    ratio = student["rows"][0]["ci95"] / normal["rows"][0]["ci95"]
    assert ratio == pytest.approx(scipy.t.ppf(0.975, 1) / scipy.norm.ppf(0.975), rel=1e-4)  # two batches
    assert student["rows"][0]["mse"] == normal["rows"][0]["mse"]


def test_plot(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "settings"))
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "draw", spy(figure.Figure.draw, drawn))
    path = tmp_path / "gap.png"
    path.write_bytes(b"of before")
    told = rows(call(*SMALL, "--codec", "lut", "--rate", "3", "--rate", "4", "--plot", path, "--json"))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(tmp_path.glob("*.partial"))
    (axes,) = drawn[0].axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"int", "lut lloyd", "lut nf4"} <= set(labels)
    assert any("Q-Palette" in label and "not measured" in label for label in labels)
    lines = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    gaps = [r["gap_db"] for r in told["rows"] if r["codec"] == "int"]
    assert list(lines["int"].get_xdata()) == [3, 4]
    assert list(lines["int"].get_ydata()) == pytest.approx(gaps, abs=1e-4)


def spy(draw: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return draw(self, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--codec", "fp4"), "unknown codec 'fp4'; there are ['float', 'int', 'lut'"),
        (("--codec", "int", "--rate", "2.25"), "no point at 2.25 bits in ['int']; nearest 2 and 3"),
        (("--rate", "2.3"), "no point at 2.3 bits"),
        (("--rate", "two"), "--rate is a number of bits, such as 2.25, or all alone; got two"),
        (("--rate", "nan"), "--rate is a number of bits"),
        (("--rate", "all", "--rate", "2"), "or all alone; got all 2"),
        (("--weights", "1000"), "1000 weights are too few"),
        (("--weights", "many"), "Invalid value for '--weights'"),
        (("--window", "13"), "got 13"),
        (("--codec", "int", "--window", "14"), "window 14 is of the codec 'trellis'"),
        (("--threads", "0"), "--threads is at least 1; got 0"),
        (("--seed", "-1"), "--seed is 0 to"),
        (("--plot", "{tmp}/none/gap.png"), "none does not exist; create it first"),
        (("--plot", "{tmp}/gap.pdf"), "--plot writes a .png file"),
        (("--plot", "{tmp}"), "--plot writes a .png file"),
    ],
)
def test_refused(arguments: tuple[str, ...], words: str, call: Call, tmp_path: Path) -> None:
    refused(call(*(a.format(tmp=tmp_path) for a in arguments)), words)
    assert list(tmp_path.iterdir()) == []


def refused(shown: SimpleNamespace, words: str) -> None:
    assert shown.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert words in shown.err


def test_plot_without_matplotlib(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(call("--plot", tmp_path / "gap.png"), "--plot needs matplotlib; pip install 'bitpalette[bench]' brings it")


def test_plot_that_cannot_be_written(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "settings"))
    path = tmp_path / "gap.png"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    shown = call(*SMALL, "--rate", "2", "--plot", path, "--json")
    assert shown.code == 2 and not list(tmp_path.glob("gap.png*"))
    assert shown.err.count("\n") == 1 and f"{path}: cannot write" in shown.err
    assert json.loads(shown.out)["rows"]  # the figures are not lost


def test_an_instruction_set_that_is_not_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPALETTE_CPU_ISA", "sse9")
    refused(call(*SMALL), "instruction set 'sse9': this machine runs")


def test_without_native_code(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitpalette.quant.native._cpu", None)
    assert rows(call(*SMALL, "--rate", "2", "--json"))["about"]["isa"] is None
    assert "no native code" in " ".join(call(*SMALL, "--rate", "2").out.split())  # lines are broken anywhere
    refused(call("--codec", "trellis", "--rate", "2"), "the CPU extension is not built")


def test_default_weights_make_many_batches() -> None:
    assert WEIGHTS >= 8 * LEAST_WEIGHTS
