"""`quantize bench kernels --device cuda` without a GPU: what it refuses, and its rows and table with made-up times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpalette.calibrate import device
from bitpalette.cli import main
from bitpalette.kernel_bench import gpu_contenders, gpu_run
from bitpalette.kernel_bench.gpu_contenders import TORCH
from bitpalette.kernel_bench.gpu_rounds import MARGIN, copies_wanted
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernel_bench.rounds import Timed
from bitpalette.kernel_bench.shapes import SCHEMES, choose_schemes
from bitpalette.kernels.base import Packed
from bitpalette.kernels.cache_folder import CACHE_VARIABLE
from bitpalette.kernels.measured_choice import DEQUANTIZE, choice_file, choice_key
from bitpalette.kernels.reference import ReferenceKernel
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme

NAME = "Made-up GPU 80GB"
US = {"torch.float16": 40.0, "torch.bfloat16": 44.0, "cuda": 10.0, "triton": 16.0, DEQUANTIZE: 60.0}
INT4 = IntScheme(bits=4, group_size=128)

Call = Callable[..., SimpleNamespace]


class OnGpu(ReferenceKernel):
    """The reference under another name, for 4-bit `int`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return None if getattr(scheme, "bits", 0) == 4 else "not these bits"

    def weight(self, packed: Packed) -> Any:
        kernel, qt = self, self.unprepare(packed)

        class Native:
            def dequantize(self, address: int, dtype: int, stream: int) -> None:
                raise AssertionError(f"{kernel.name} {qt.shape} is not run here")

        return SimpleNamespace(native=Native())


def made_up_rounds(contenders: Any, x: torch.Tensor, *, rounds: int, copier: Any, **_: Any) -> list[Timed]:
    timed = []
    for contender, copies in contenders:
        t = Timed(contender, copies, read_bytes=copier.bytes, footprint=1 << 30)
        for r in range(rounds):
            t.seconds[r] = US[contender.kernel] * 1e-6 * (1 + 0.01 * (r % 3)) * x.shape[0]
            t.read_seconds[r] = copier.bytes / 3e12
        if contender.kernel != DEQUANTIZE and contender.expected is not None:
            t.error = contender.expected.error(contender.first(contender.to_input(x)))
            assert t.error <= contender.expected.tolerance
        timed.append(t)
    return timed


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", "bench", "kernels", *map(str, arguments)])
        code = main()
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose memory is the CPU's, and kernels `cuda` and `triton` on it."""
    kernels = {name: OnGpu(name) for name in ("cuda", "triton")}

    monkeypatch.setattr(gpu_run, "time_on_gpu", made_up_rounds)
    monkeypatch.setattr(gpu_run, "device_name", lambda device: NAME)
    monkeypatch.setattr(gpu_run, "Copier", lambda device: SimpleNamespace(bytes=1 << 30))
    monkeypatch.setattr("bitpalette.kernel_bench.gpu_rounds.l2_bytes", lambda device: 50 << 20)
    monkeypatch.setattr(device, "choose_device", lambda name: torch.device("meta" if name == "cuda" else "cpu"))
    for module in (gpu_run, gpu_contenders):
        monkeypatch.setattr(module, "kernels", lambda: kernels)
    monkeypatch.setattr("bitpalette.kernel_bench.run.kernels", lambda: kernels)
    # the made-up device is called "meta"; tensors are made where the generator is
    generator, randn = torch.Generator, torch.randn
    monkeypatch.setattr(torch, "Generator", lambda *device: generator())
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **options: randn(*size, **options))


ONE = ("--shape", "64x256", "--scheme", "int,bits=4,group_size=128", "--rounds", "6", "--device", "cuda")


def test_rows(call: Call, gpu: None) -> None:
    shown = call(*ONE, "--scheme", "int,bits=3", "--tokens", "1", "--tokens", "16", "--json")
    assert shown.code == 0, shown.err
    got = json.loads(shown.out)
    assert got["about"]["device"] == NAME and got["about"]["clock"] == "gpu" and got["about"]["dtype"] == "float16"
    assert got["about"]["footprint_wanted"] == MARGIN * (50 << 20)
    for tokens in (1, 16):
        rows = {r["kernel"]: r for r in got["rows"] if r["tokens"] == tokens and r["median_us"]}
        assert set(rows) == {*TORCH, "cuda", "triton", DEQUANTIZE}
        for name, row in rows.items():
            assert row["device"] == NAME and row["threads"] == 0 and row["clock"] == "gpu"
            assert row["median_us"] == pytest.approx(US[name] * tokens, rel=0.02)
            assert row["x_float16"] == pytest.approx(40 / US[name], rel=1e-3)
            assert row["read_gbytes_per_s"] == pytest.approx(3000, rel=1e-3)
            assert row["read_share"] == pytest.approx(row["gbytes_per_s"] / 3000, rel=1e-2)
        assert rows["cuda"]["error"] <= 0.002
    [absent] = [r for r in got["rows"] if r["tokens"] == 1 and not r["median_us"]]
    assert absent["note"] == "cuda: not these bits; triton: not these bits"
    assert not choice_file(NAME).exists()


def test_table_and_store(call: Call, gpu: None) -> None:
    shown = call(*ONE, "--tokens", "1", "--tokens", "3", "--store")
    assert shown.code == 0, shown.err
    assert str(choice_file(NAME)) in shown.err and shown.err.count("\n") == 1
    for words in ("of copy", "x fp16", "gpu time", NAME, "64 x 256, tokens: 1 "):
        assert words in shown.out, words
    assert "threads" not in shown.out
    times = json.loads(choice_file(NAME).read_text())["times"]
    assert list(times) == [choice_key(INT4, (64, 256))]
    [of_key] = times.values()
    assert list(of_key) == ["1"]  # 3 tokens are no class
    assert of_key["1"] == {name: pytest.approx(US[name], rel=0.02) for name in ("cuda", "triton", DEQUANTIZE)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "tpu"), "--device is cpu, cuda or cuda:N; got 'tpu'"),
        (("--device", "meta"), "--device is cpu, cuda or cuda:N; got 'meta'"),
        (("--device", "cuda:99"), "sees "),
        (("--store",), "--store is for GPUs"),
    ],
)
def test_refused(arguments: tuple[str, ...], words: str, call: Call) -> None:
    shown = call("--shape", "64x256", *arguments)
    assert shown.code == 2 and words in shown.err and shown.err.count("\n") == 1, shown.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--threads", "1"), "--threads is of CPU kernels; leave it out with --device cuda"),
        (("--isa", "avx2"), "--isa is of CPU kernels"),
        (("--clock", "cpu"), "a GPU's time is taken by CUDA events"),
        (("--dtype", "float32"), "multiply float16 and bfloat16"),
    ],
)
def test_refused_on_a_gpu(arguments: tuple[str, ...], words: str, call: Call, gpu: None) -> None:
    shown = call(*ONE, *arguments)
    assert shown.code == 2 and words in shown.err and shown.err.count("\n") == 1, shown.err


def test_copies_exceed_the_cache_within_the_memory() -> None:
    assert copies_wanted(8 << 20, 50 << 20, 1 << 30) == 20
    assert (copies_wanted(8 << 20, 50 << 20, 1 << 30) - 1) * (8 << 20) >= MARGIN * (50 << 20)
    assert copies_wanted(8 << 20, 50 << 20, 32 << 20) == 4
    assert copies_wanted(1 << 30, 50 << 20, 1 << 20) == 1


def test_random_weights_on_a_device_are_those_of_its_generator() -> None:
    for scheme in choose_schemes(SCHEMES):
        qt = random_weight(scheme, (64, 128), torch.Generator("cpu").manual_seed(3))
        assert {t.device.type for t in qt.fields.values()} == {"cpu"}
