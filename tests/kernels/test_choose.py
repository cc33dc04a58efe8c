"""Choosing a kernel: the environment, the ranking, the reasons."""

from __future__ import annotations

import pytest
import torch

from bitpalette.kernels.base import FORCE_VARIABLE, KernelError, choose, explain
from bitpalette.kernels.registry import kernels
from bitpalette.quant import native
from bitpalette.quant.int import IntScheme

CPU = torch.device("cpu")
INT4 = IntScheme(bits=4, group_size=64)


def test_the_reference_is_last_and_takes_all() -> None:
    assert list(kernels())[-1] == "reference"
    assert choose(IntScheme(bits=3), (7, 5), CPU).name == "reference"
    assert kernels()["reference"].why_not(IntScheme(bits=3), (7, 5), torch.device("cuda")) is None


def test_the_fastest_that_can() -> None:
    name = choose(INT4, (64, 64), CPU).name
    assert name == ("cpu_int4" if native.available_isas() else "reference")


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert choose(INT4, (64, 64), CPU).name == "reference"
    monkeypatch.setenv(FORCE_VARIABLE, "cpu_int4")
    with pytest.raises(KernelError, match=r"BITPALETTE_KERNEL=cpu_int4 cannot run int bits=3.*at 4 bits"):
        choose(IntScheme(bits=3), (64, 64), CPU)
    monkeypatch.setenv(FORCE_VARIABLE, "warp_drive")
    with pytest.raises(KernelError, match=r"warp_drive names no kernel; there are .*reference"):
        choose(INT4, (64, 64), CPU)


@pytest.mark.parametrize(
    ("scheme", "device", "reason"),
    [
        (INT4, "cuda", "not on cuda"),
        (IntScheme(bits=5), "cpu", "at 4 bits"),
        (IntScheme(bits=4, group_size=48), "cpu", "multiple of 32 or 0, not 48"),
        (IntScheme(bits=4, per_input_channel=True), "cpu", "input channel"),
    ],
)
def test_reasons(scheme: IntScheme, device: str, reason: str) -> None:
    said = explain(scheme, (64, 64), torch.device(device))
    assert reason in str(said["cpu_int4"]) and said["reference"] is None


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu", None)
    assert native.available_isas() == []
    assert "not built" in str(kernels()["cpu_int4"].why_not(INT4, (64, 64), CPU))
    assert choose(INT4, (64, 64), CPU).name == "reference"
    with pytest.raises(native.NativeError, match="not built"):
        native.cpu_module()
