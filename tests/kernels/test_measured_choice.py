"""Kernels ranked by what was measured on a GPU: with a made-up GPU, kernels and table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.kernels import base, measured_choice
from bitpalette.kernels.base import FORCE_VARIABLE, KernelError, choose
from bitpalette.kernels.cache_folder import CACHE_VARIABLE
from bitpalette.kernels.measured_choice import (
    CLASSES,
    DEQUANTIZE,
    choice_file,
    choice_key,
    fastest,
    store_times,
    token_class,
)
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme

GPU = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
INT4 = IntScheme(bits=4, group_size=128)
SHAPE = (4096, 4096)
KEY = choice_key(INT4, SHAPE)


class Named:
    """A kernel that runs everything on GPUs, or nothing."""

    def __init__(self, name: str, rank: int, reason: str | None = None) -> None:
        self.name, self.rank, self.reason = name, rank, reason

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return self.reason


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Kernels a, b and c, by rank, and a GPU without a table."""
    kernels: dict[str, Any] = {name: Named(name, rank) for rank, name in enumerate("abc")}
    monkeypatch.setattr(base, "kernels", lambda: kernels)
    monkeypatch.setattr(measured_choice, "_device_name", lambda device: NAME)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    return kernels


def chosen(scheme: Scheme = INT4, shape: tuple[int, int] = SHAPE, device: torch.device = GPU) -> str:
    return choose(scheme, shape, device).name


def test_by_rank_without_a_table() -> None:
    assert chosen() == "a"
    assert not choice_file(NAME).exists()


def test_by_the_table_of_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    path = store_times(NAME, {(KEY, 1): {"a": 12.0, "b": 10.0}})
    assert path == choice_file(NAME) and path.name == "choose-nvidia-h100-80gb-hbm3.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert chosen() == "b"
    # a layer's transforms are not its kernel's
    assert chosen(INT4.replace(transforms=("rotate",))) == "b"
    # another scheme, another shape, another device, another GPU
    assert chosen(IntScheme(bits=4)) == "a"
    assert chosen(shape=(4096, 4097)) == "a"
    assert chosen(device=torch.device("cpu")) == "a"
    monkeypatch.setattr(measured_choice, "_device_name", lambda device: "NVIDIA A100")
    assert chosen() == "a"


def test_what_was_not_measured_at_all_sizes_is_compared_where_it_was() -> None:
    store_times(NAME, {(KEY, 1): {"a": 10.0, "b": 14.0}, (KEY, 16): {"a": 40.0, "b": 20.0}})
    assert chosen() == "b"  # the geometric means are 20 and 16.7
    store_times(NAME, {(KEY, 1): {"a": 10.0, "b": 41.0}})
    assert chosen() == "a"
    store_times(NAME, {(KEY, 64): {"b": 1.0}})  # a was not measured there: b is known to be fast, a is not
    assert chosen() == "b"
    store_times(NAME, {(KEY, 64): {"c": 1.0}})  # nothing was measured everywhere
    assert chosen() == "a"


def test_a_kernel_that_cannot_is_never_chosen(machine: dict[str, Any]) -> None:
    store_times(NAME, {(KEY, 1): {"a": 3.0, "b": 1.0, "c": 2.0}})
    machine["b"].reason = "needs another card"
    assert chosen() == "c"
    machine["c"].reason = "too"
    assert chosen() == "a"
    machine["a"].reason = "none"
    with pytest.raises(KernelError, match=r"no kernel runs .* b: needs another card; c: too; a: none"):
        chosen()


def test_a_forced_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    store_times(NAME, {(KEY, 1): {"a": 3.0, "b": 1.0}})
    monkeypatch.setenv(FORCE_VARIABLE, "c")
    assert chosen() == "c"


def test_the_fastest_for_a_number_of_tokens() -> None:
    store_times(NAME, {(KEY, 8): {"a": 3.0, "b": 4.0}, (KEY, 512): {"a": 9.0, "dequantize": 5.0}})
    assert fastest(INT4, SHAPE, GPU, 1) is None
    assert [fastest(INT4, SHAPE, GPU, tokens) for tokens in (5, 8, 300, 9000)] == ["a", "a", "dequantize", "dequantize"]
    assert chosen() == "a"  # dequantizing is no kernel
    assert [token_class(tokens) for tokens in (1, 2, 3, 9, 512, 513)] == [1, 2, 4, 16, 512, 512]


def test_what_is_measured_again_takes_the_place() -> None:
    store_times(NAME, {(KEY, 1): {"a": 3.0, "b": 1.0}, (KEY, 2): {"a": 1.0}})
    store_times(NAME, {(KEY, 1): {"a": 1.0, "c": 2.0}})
    times = json.loads(choice_file(NAME).read_text())
    assert times["times"] == {KEY: {"1": {"a": 1.0, "c": 2.0}, "2": {"a": 1.0}}}
    assert times["device"] == NAME


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2, "times": {}}',
        '{"format": 1}',
        '{"format": 1, "times": {"k": {"1": {"a": NaN}}}}',
        '{"format": 1, "times": {"k": {"3": {"a": 1.0}}}}',
        '{"format": 1, "times": {"k": {"1": {"a": "fast"}}}}',
    ],
)
def test_a_damaged_table_is_said_once(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    choice_file(NAME).parent.mkdir(parents=True)
    choice_file(NAME).write_text(content)
    assert chosen() == "a" and chosen() == "a"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(choice_file(NAME)) in said and "delete it" in said


def test_classes_rise() -> None:
    assert list(CLASSES) == sorted(set(CLASSES))


def test_from_where_on_dequantizing_is_faster() -> None:
    def most() -> int:
        return measured_choice.most_tokens(INT4, SHAPE, GPU, "cuda", 256)

    def measured(**faster: str) -> None:
        times = {"cuda": {"cuda": 10.0, DEQUANTIZE: 20.0}, "dequantize": {"cuda": 20.0, DEQUANTIZE: 10.0}}
        store_times(NAME, {(KEY, int(tokens[1:])): times[name] for tokens, name in faster.items()})

    assert most() == 256
    measured(t1="cuda", t64="cuda", t512="dequantize")  # 512 is beyond what a GEMM takes
    assert most() == 256
    measured(t256="cuda")
    assert most() == 256
    measured(t256="dequantize")
    assert most() == 128  # the class of 256 begins there
    measured(t128="dequantize")
    assert most() == 64
    measured(t8="dequantize")  # slower once more tokens come, so it is no reason to begin at 8
    assert most() == 64
    measured(t64="dequantize", t1="dequantize")
    assert most() == 0
    assert measured_choice.most_tokens(INT4, (4096, 4097), GPU, "cuda", 256) == 256
    assert measured_choice.most_tokens(INT4, SHAPE, GPU, "another", 256) == 256
    assert measured_choice.most_tokens(INT4, SHAPE, torch.device("cpu"), "cuda", 256) == 256
