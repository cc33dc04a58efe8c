"""Choosing a kernel: the environment, the ranking, the reasons."""

from __future__ import annotations

import pytest
import torch

from bitpalette.kernels.base import FORCE_VARIABLE, KernelError, choose, explain
from bitpalette.kernels.registry import kernels
from bitpalette.quant import native
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme

CPU = torch.device("cpu")
INT4 = IntScheme(bits=4, group_size=64)


def test_the_reference_is_last_and_takes_all() -> None:
    assert list(kernels())[-1] == "reference"
    assert choose(IntScheme(bits=3, per_input_channel=True), (7, 5), CPU).name == "reference"
    assert kernels()["reference"].why_not(IntScheme(bits=3), (7, 5), torch.device("cuda")) is None


def test_the_fastest_that_can() -> None:
    name = choose(INT4, (64, 64), CPU).name
    assert name == ("cpu_int" if native.available_isas() else "reference")


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert choose(INT4, (64, 64), CPU).name == "reference"
    monkeypatch.setenv(FORCE_VARIABLE, "cpu_int")
    with pytest.raises(KernelError, match=r"BITPALETTE_KERNEL=cpu_int cannot run lut .*: runs codec int, not lut"):
        choose(LutScheme(), (64, 64), CPU)
    monkeypatch.setenv(FORCE_VARIABLE, "warp_drive")
    with pytest.raises(KernelError, match=r"warp_drive names no kernel; there are .*reference"):
        choose(INT4, (64, 64), CPU)


@pytest.mark.parametrize(
    ("scheme", "device", "reason"),
    [
        (INT4, "cuda", "not on cuda"),
        (LutScheme(), "cpu", "runs codec int, not lut"),
        (IntScheme(bits=4, group_size=48), "cpu", "multiple of 32 or 0, not 48"),
        (IntScheme(bits=4, per_input_channel=True), "cpu", "input channel"),
    ],
)
def test_reasons(scheme: IntScheme, device: str, reason: str) -> None:
    said = explain(scheme, (64, 64), torch.device(device))
    assert reason in str(said["cpu_int"]) and said["reference"] is None


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (LutScheme(entries=64, dims=2), "a code for each weight (dims 1), not one for two"),
        (LutScheme(entries=17), "at most 16 entries, not 17"),
        (LutScheme(group_size=40), "multiple of 32 or 0, not 40"),
        (IntScheme(), "runs codec lut, not int"),
    ],
)
def test_reasons_of_tables(scheme: Scheme, reason: str) -> None:
    assert reason in str(explain(scheme, (64, 64), CPU)["cpu_lut"])


def test_bytes_in_canonical_layout_come_first() -> None:
    name = choose(IntScheme(bits=8), (64, 64), CPU).name
    assert name == ("cpu_int8" if native.available_isas() else "reference")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu", None)
    assert native.available_isas() == []
    assert "not built" in str(kernels()["cpu_int"].why_not(INT4, (64, 64), CPU))
    assert choose(INT4, (64, 64), CPU).name == "reference"
    with pytest.raises(native.NativeError, match="not built"):
        native.cpu_module()
