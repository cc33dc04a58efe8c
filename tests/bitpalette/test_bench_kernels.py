"""`quantize bench kernels`: that it times what it says, in the order it says, and never a kernel that is wrong."""

from __future__ import annotations

import csv
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.cli import main
from bitpalette.kernel_bench.contender import Contender, scheme_label
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernel_bench.rounds import (
    CLOCKS,
    FEWEST_ROUNDS,
    WARM_UP,
    Reader,
    Timed,
    speed_over,
    spread,
    time_rounds,
)
from bitpalette.kernel_bench.shapes import MODELS, SCHEMES, choose_layers, choose_schemes
from bitpalette.kernels.base import Packed
from bitpalette.kernels.reference import ReferenceKernel
from bitpalette.kernels.registry import kernels
from bitpalette.provenance import last_level_cache
from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import available_isas
from bitpalette.quant.scheme import Scheme

MIB = 1 << 20
SMALL = ("--shape", "64x256", "--tokens", "1", "--scheme", "int,bits=4,group_size=128", "--rounds", "8")

Call = Callable[..., SimpleNamespace]

native = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments) -> code, out and err of `quantize bench kernels` on a machine with a cache of 1 MiB."""
    monkeypatch.setattr("bitpalette.kernel_bench.run.last_level_cache", lambda: MIB)

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", "bench", "kernels", *map(str, arguments)])
        code = main()
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def told(shown: SimpleNamespace, code: int = 0) -> dict[str, Any]:
    assert shown.code == code, shown.err
    assert shown.err == "" and shown.out.count("\n") == 1
    return json.loads(shown.out)


@native
def test_json(call: Call) -> None:
    got = told(call(*SMALL, "--tokens", "3", "--threads", "1", "--json"))
    assert got["about"]["cache"] == MIB and got["about"]["threads"] == [1]
    rows = got["rows"]
    assert {r["tokens"] for r in rows} == {1, 3}
    for tokens in (1, 3):
        here = [r for r in rows if r["tokens"] == tokens]
        names = [(r["kernel"], r["isa"]) for r in here]
        assert len(set(names)) == len(names)
        for isa in available_isas():
            assert ("cpu_int", isa) in names
        for name in ("torch.float32", "torch.bfloat16", "torch.int4", "torch.int8", "reference"):
            assert (name, "") in names
    for r in rows:
        assert (r["out_features"], r["in_features"], r["threads"]) == (64, 256, 1)
        assert r["device"] and r["commit"] and r["cache_mib"] == 1
        assert r["from_memory"] and r["footprint_mib"] > 1.5
        assert FEWEST_ROUNDS <= r["rounds"] <= 8
        assert 0 < r["p20_us"] <= r["median_us"] <= r["p80_us"]
        assert 0 < r["read_share_p20"] <= r["read_share"] <= r["read_share_p80"]
        assert r["gweights_per_s"] == pytest.approx(64 * 256 / r["median_us"] / 1e3, rel=1e-2)
        assert r["gbytes_per_s"] == pytest.approx(r["gweights_per_s"] * r["packed_bits"] / 8, rel=1e-2)
        assert r["gflops"] == pytest.approx(2 * r["tokens"] * r["gweights_per_s"], rel=1e-2)
        for name in ("float32", "bfloat16", "int4", "int8"):
            assert 0 <= r[f"x_{name}_p20"] <= r[f"x_{name}"] <= r[f"x_{name}_p80"]
            if r["kernel"] == f"torch.{name}":
                assert r[f"x_{name}"] == 1
        if not r["kernel"].startswith("torch."):
            assert r["scheme"] == "int bits=4 group_size=128" and r["packed_bits"] == 4.125
            assert 0 <= r["error"] <= 0.02


@native
def test_table_and_csv(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    one = "--isa", available_isas()[0]
    shown = call(*SMALL, "--scheme", "trellis,rate=2.5", "--kernel", "cpu_int", *one, "--csv", path)
    assert shown.code == 0 and shown.err == ""
    assert "64 x 256, tokens: 1, threads:" in shown.out
    for words in ("of read", "x bf16", "cpu_int", "torch.int8", "none of ['cpu_int'] runs it"):
        assert words in " ".join(shown.out.split())
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["kernel"] for r in rows if r["scheme"] == "int bits=4 group_size=128"] == ["cpu_int"]
    assert all(float(r["median_us"]) > 0 for r in rows if not r["note"])
    assert not list(tmp_path.glob("*.partial"))


def test_what_torch_lacks_is_said(call: Call) -> None:
    # 123 columns are too few for a scale of 128: the scheme's own words
    got = told(call(*SMALL, "--shape", "17x123", "--scheme", "int,bits=4", "--kernel", "reference", "--json"))["rows"]
    notes = {r["kernel"] or r["scheme"]: r["note"] for r in got if r["out_features"] == 17}
    assert "16" in notes["torch.int4"]
    assert "group_size 128 is wider than the weight's 123 columns" in notes["int bits=4 group_size=128"]
    assert notes["reference"] == ""


def test_weights_that_stay_in_the_cache_are_named(call: Call) -> None:
    rows = told(call(*SMALL, "--kernel", "reference", "--memory", "1MiB", "--json"))["rows"]
    small = [r for r in rows if r["median_us"] is not None]
    assert small and all(r["from_memory"] is False and "from the cache" in r["note"] for r in small)
    rows = told(call(*SMALL, "--kernel", "reference", "--shape", "1024x1024", "--memory", "4MiB", "--json"))["rows"]
    assert any(r["kernel"] == "torch.float32" and "raise --memory" in r["note"] for r in rows)


def test_schemes_that_do_not_fit_together_are_measured_in_parts(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpalette.kernel_bench import run

    parts: list[list[str]] = []
    of_scheme = run._of_scheme

    def spy(*arguments: Any) -> list[Contender]:
        parts[-1].append(scheme_label(arguments[0]))
        return of_scheme(*arguments)

    def once(*arguments: Any, **settings: Any) -> list[Timed]:
        timed = time_rounds(*arguments, **settings)
        parts.append([])
        return timed

    monkeypatch.setattr(run, "_of_scheme", spy)
    monkeypatch.setattr(run, "time_rounds", once)
    parts.append([])
    texts = [f"int,bits={bits}" for bits in (2, 4, 8)]
    schemes = [word for text in texts for word in ("--scheme", text)]
    size = ("--shape", "256x256", "--tokens", "1", "--rounds", "4", "--kernel", "reference", "--memory", "1550kB")
    rows = told(call(*size, *schemes, "--json"))["rows"]
    assert [p for p in parts if p] == [["int bits=2", "int bits=4"], ["int bits=8"]]
    assert [r["kernel"] for r in rows].count("torch.float32") == 1
    assert [r["scheme"] for r in rows if r["kernel"] == "reference"] == ["int bits=2", "int bits=4", "int bits=8"]


class Wrong(ReferenceKernel):
    """The reference, but for what it computes."""

    name = "wrong"
    rank = 1

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        self.spoil = spoil
        self.calls = 0

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        self.calls += 1
        return self.spoil(super().linear(x, packed, bias))


@pytest.mark.parametrize("spoil", [lambda y: y * 1.1, lambda y: y * math.nan], ids=["scaled", "nan"])
def test_a_wrong_kernel_is_never_timed(
    spoil: Callable[[Tensor], Tensor], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Wrong(spoil)
    monkeypatch.setattr("bitpalette.kernel_bench.contender.kernels", lambda: {"wrong": wrong, **kernels()})
    monkeypatch.setattr("bitpalette.kernel_bench.run.kernels", lambda: {"wrong": wrong, **kernels()})
    rows = told(call(*SMALL, "--kernel", "wrong", "--kernel", "reference", "--json"), code=1)["rows"]
    (row,) = (r for r in rows if r["kernel"] == "wrong")
    assert row["note"].startswith("wrong: relative error") and row["median_us"] is None and row["rounds"] == 0
    assert wrong.calls == 1
    assert any(r["kernel"] == "reference" and r["median_us"] for r in rows)
    assert call(*SMALL, "--kernel", "wrong").code == 1


def test_plot(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "settings"))
    drawn: list[Any] = []
    draw = figure.Figure.draw
    monkeypatch.setattr(figure.Figure, "draw", lambda self, *a, **k: (drawn.append(self), draw(self, *a, **k)))
    path = tmp_path / "speed.png"
    rows = told(call(*SMALL, "--tokens", "4", "--kernel", "reference", "--plot", path, "--json"))["rows"]
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {"torch.float32", "torch.int8", "int bits=4 group_size=128"} <= set(lines)
    speeds = [r["x_bfloat16"] for r in rows if r["kernel"] == "reference"]
    assert list(lines["int bits=4 group_size=128"].get_ydata()) == speeds
    assert list(lines["torch.float32"].get_xdata()) == [1, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "64"), "--shape is OUTxIN, such as 4096x4096; got '64'"),
        (("--shape", "0x64"), "--shape is OUTxIN"),
        (("--model", "llama"), "--model is one of ['smollm2-135m'"),
        (("--tokens", "0"), "--tokens is at least 1; got 0"),
        (("--threads", "-1"), "--threads is at least 1; got -1"),
        (("--scheme", "int,bits=9"), "bits is a whole number, 1 to 8; got 9"),
        (("--scheme", "keep"), "keeps 16 bits"),
        (("--scheme", "int,bits"), "is no scheme"),
        (("--scheme", 'int,bits=4,transforms=["rotate"]'), "leave the transforms out"),
        (("--kernel", "cpu_fp4"), "--kernel is one of ["),
        (("--dtype", "float64"), "--dtype is one of ['float32'"),
        (("--rounds", "3"), "--rounds is at least 4; got 3"),
        (("--seconds", "0"), "--seconds is above 0; got 0"),
        (("--seconds", "nan"), "--seconds is above 0; got nan"),
        (("--clock", "sun"), "--clock is one of ['wall', 'cpu']; got 'sun'"),
        (("--clock", "cpu", "--threads", "2"), "--threads 1 with it; got 2"),
        (("--memory", "much"), "--memory 'much' is no size such as 1GiB"),
        (("--memory", "1kB"), "--memory is at least 1MiB; got '1kB'"),
        (("--seed", "-1"), "--seed is 0 to"),
        (("--plot", "{tmp}/speed.pdf"), "--plot writes a .png file"),
        (("--csv", "{tmp}/none/rows.csv"), "none does not exist"),
        (("--csv", "{tmp}"), "a folder"),
    ],
)
def test_refused(arguments: tuple[str, ...], words: str, call: Call, tmp_path: Path) -> None:
    refused(call(*(a.replace("{tmp}", str(tmp_path)) for a in arguments)), words)
    assert list(tmp_path.iterdir()) == []


def refused(shown: SimpleNamespace, words: str) -> None:
    assert shown.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert words in shown.err


@native
def test_an_instruction_set_that_is_not_there(call: Call) -> None:
    refused(call(*SMALL, "--isa", "sse9"), "instruction set 'sse9': this machine runs")


def test_plot_without_matplotlib(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(call("--plot", tmp_path / "speed.png"), "--plot needs matplotlib; pip install 'bitpalette[bench]'")


def test_without_native_code(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitpalette.quant.native._cpu", None)
    rows = told(call(*SMALL, "--json"))["rows"]
    assert {r["kernel"] for r in rows if r["scheme"].startswith("int")} == {"reference"}
    assert all(r["read_share"] is None and r["x_float32"] > 0 for r in rows if not r["note"])


# -- parts


def test_models() -> None:
    assert [layer.shape for layer in choose_layers((), ())] == [(4096, 4096)]
    every = choose_layers((), ("all",))
    assert {layer.shape for layer in every} == {shape for layers in MODELS.values() for shape in layers.values()}
    assert len(every) == len({layer.shape for layer in every})
    (first, *_) = choose_layers(("576x576",), ("smollm2-135m",))
    assert first.name == "" and first.shape == (576, 576)


def schemes() -> list[Scheme]:
    more = (
        '{"codec": "lut", "entries": 5, "table": "values", "values": [-3, -1, 0, 0.5, 2]}',
        "lut,entries=8,table=kmeans,table_scope=row,scaled=false",
        "lut,entries=6,table=kmeans",
        "lut,table=nf4",
        "lut,entries=64,dims=2",
        "int,bits=3,symmetric=false,group_size=64",
    )
    parsed = choose_schemes((*SCHEMES, *more))
    assert len(parsed) == len(SCHEMES) + len(more)
    return parsed


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_random_weights_are_weights(scheme: Scheme) -> None:
    qt = random_weight(scheme, (33, 160), torch.Generator().manual_seed(0))
    w = get_codec(scheme.codec).decode(qt)
    assert w.shape == (33, 160) and bool(w.isfinite().all())
    assert 1e-4 < float(w.std()) < 1
    assert len(w.unique()) > 33  # not one value over and over


def test_labels_name_the_rate() -> None:
    labels = [
        scheme_label(s) for s in choose_schemes(("int,bits=4", "lut,entries=16,group_size=128", "trellis,rate=4"))
    ]
    assert labels == ["int bits=4", "lut entries=16 group_size=128", "trellis rate=4"]


def test_last_level_cache(tmp_path: Path) -> None:
    for i, (level, size) in enumerate(((1, "48K"), (3, "1536K"), (2, "2048K"))):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}/level").write_text(f"{level}\n")
        (tmp_path / f"index{i}/size").write_text(f"{size}\n")
    assert last_level_cache(tmp_path) == 1536 << 10
    assert last_level_cache(tmp_path / "none") is None


def test_spread() -> None:
    assert [spread([5.0, 1, 4, 2, 3, 6]).__dict__[k] for k in ("median", "p20", "p80")] == [3.5, 2, 5]


def test_speeds_are_taken_within_a_round() -> None:
    ours, other = (Timed(None, []) for _ in range(2))  # type: ignore[arg-type]
    ours.seconds, other.seconds = {0: 1.0, 1: 10, 2: 1, 3: 1}, {0: 2.0, 1: 20, 4: 500}
    assert speed_over(ours, other) == spread([2.0, 2.0])
    other.seconds = {7: 1.0}
    assert speed_over(ours, other) is None


class Recorded:
    """A contender of `nbytes` whose calls are written into `log` as (name, copy)."""

    def __init__(self, name: str, nbytes: int, log: list[tuple[str, int]]) -> None:
        self.made = 0
        self.name, self.log = name, log
        self.contender = Contender(
            *(name, "", "", "float32", (1, 8), nbytes), self._copy(), self._copy, to_input=lambda x: x
        )

    def _copy(self) -> Callable[[Tensor], Tensor]:
        number = self.made
        self.made += 1

        def run(x: Tensor) -> Tensor:
            self.log.append((self.name, number))
            return x

        return run


def test_no_copy_comes_again_before_the_cache_has_been_read() -> None:
    log: list[tuple[str, int]] = []
    sizes = {"a": 300_000, "b": 100_000}
    entered = [Recorded(name, nbytes, log) for name, nbytes in sizes.items()]
    timed = time_rounds(
        [(r.contender, [], 1) for r in entered],
        *(torch.ones(2, 8),),
        rounds=20,
        seconds=1.0,
        memory=100 * MIB,
        cache=MIB,
        reader=None,
    )
    assert all(len(t.seconds) == 20 for t in timed) and timed[0].footprint >= 1.5 * MIB
    # number 0 warms up and is not timed: it comes right before each timed call
    rounds = log[-4 * (20 + WARM_UP) :]
    assert [name for name, _ in rounds] == ["a", "a", "b", "b"] * (20 + WARM_UP)
    assert all(number == 0 for _, number in rounds[::2]) and all(number != 0 for _, number in rounds[1::2])
    calls = rounds[1::2]
    for i, once in enumerate(calls):
        again = next((j for j in range(i + 1, len(calls)) if calls[j] == once), None)
        if again is not None:
            assert sum(sizes[name] for name, _ in calls[i:again]) >= 1.5 * MIB
    assert gc.isenabled()


def test_memory_bounds_the_copies() -> None:
    entered = [Recorded(name, MIB, []) for name in "ab"]
    copies: list[list[Any]] = [[], []]
    (timed, _) = time_rounds(
        [(r.contender, c, 1) for r, c in zip(entered, copies, strict=True)],
        torch.ones(1, 8),
        rounds=4,
        seconds=1.0,
        memory=8 * MIB,
        cache=100 * MIB,
        reader=None,
    )
    assert [len(c) for c in copies] == [3, 3]  # and the one that warms up: 8 MiB
    assert timed.footprint == 6 * MIB


def test_slow_contenders_take_part_in_fewer_rounds() -> None:
    from time import sleep

    slow = Contender(
        *("slow", "", "", "float32", (1, 8), 8), sleep_call := lambda x: sleep(0.01), lambda: sleep_call, lambda x: x
    )
    fast = Recorded("fast", 8, []).contender
    timed = time_rounds(
        [(slow, [], 1), (fast, [], 1)], torch.ones(1, 8), rounds=16, seconds=0.04, memory=MIB, cache=8, reader=None
    )
    assert timed[0].stride == 4 and sorted(timed[0].seconds) == [0, 4, 8, 12] and len(timed[1].seconds) == 16
    ratio = speed_over(timed[0], timed[1])
    assert ratio is not None and ratio.median < 0.1


def test_numbers_of_threads_take_turns_within_a_round() -> None:
    seen: list[int] = []
    call = lambda x: seen.append(torch.get_num_threads())  # noqa: E731 - a contender's call
    asks = Contender(*("asks", "", "", "float32", (1, 8), 8), call, lambda: call, lambda x: x)
    before = torch.get_num_threads()
    settings: dict[str, Any] = {"rounds": 4, "seconds": 1.0, "memory": MIB, "cache": 8, "reader": None}
    alone, two = time_rounds([(asks, [], 1), (asks, [], 2)], torch.ones(1, 8), **settings)
    assert seen[-8:] == [1, 1, 2, 2] * 2 and torch.get_num_threads() == before
    assert (alone.threads, two.threads) == (1, 2) and alone.seconds.keys() == two.seconds.keys()


def test_a_clock_of_computing_leaves_waiting_out() -> None:
    from time import sleep

    waits = Contender(*("waits", "", "", "float32", (1, 8), 8), f := lambda x: sleep(0.005), lambda: f, lambda x: x)
    settings: dict[str, Any] = {"rounds": 4, "seconds": 1.0, "memory": MIB, "cache": 8, "reader": None}
    for name, low, high in (("wall", 0.005, 1.0), ("cpu", 0.0, 0.0025)):
        (timed,) = time_rounds([(waits, [], 1)], torch.ones(1, 8), clock=CLOCKS[name], **settings)
        assert low < spread(list(timed.seconds.values())).median < high


@native
def test_reader_goes_round_its_buffer() -> None:
    reader = Reader(10_000)
    assert reader.bytes_for(4000) == 4000 and reader.bytes_for(1 << 30) == 10_000
    for isa in ("", *available_isas()):
        assert all(reader.seconds(isa, 4000) > 0 for _ in range(5))
    assert reader._at <= 10_000
