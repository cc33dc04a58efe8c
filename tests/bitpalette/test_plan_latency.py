"""Predicted tokens a second: what is measured, kept, read back and added up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_models import llama

import bitpalette.plan_latency as plan_latency
from bitpalette.calibrate.plan import PlanError
from bitpalette.kernel_bench.rounds import Spread
from bitpalette.plan_latency import LatencyTable, check_device, weights_bytes
from bitpalette.plan_step import layer_times, random_model, step_times
from bitpalette.quant.native import why_no_cpu_module
from bitpalette.quant.scheme import Scheme

INT4 = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 32, "transforms": ["rotate"]})
TRELLIS = Scheme.from_dict({"codec": "trellis", "rate": 2})
BARE = INT4.replace(transforms=())
SHAPE, WIDE = (48, 64), (96, 64)
native = pytest.mark.skipif(why_no_cpu_module() is not None, reason="no native code")


class Counted:
    """Times by scheme and shape, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.asked: list[tuple[Any, Any]] = []
        self.totals = 0
        monkeypatch.setenv("BITPALETTE_CACHE", str(tmp_path))
        monkeypatch.setattr(plan_latency, "layer_times", self.layers)
        monkeypatch.setattr(plan_latency, "rest_of_step", self.total)

    def layers(self, schemes: Any, shape: Any, threads: int, read: int) -> list[Spread]:
        self.asked += [(scheme, shape) for scheme in schemes]
        return [Spread(t, 0.9 * t, 1.2 * t) for t in ((0.001 if s == BARE else 0.003) * shape[0] / 48 for s in schemes)]

    def total(self, config: Any, schemes: Any, threads: int) -> Spread:
        self.totals += 1
        return Spread(0.010, 0.009, 0.012)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    return Counted(monkeypatch, tmp_path)


def test_a_step_is_its_rest_and_its_layers(counted: Counted) -> None:
    config, table = llama().config, LatencyTable(1)
    reference = {"a": (INT4, SHAPE), "b": (INT4, WIDE)}
    plan = {"a": (TRELLIS, SHAPE), "b": (INT4, WIDE)}
    rest = 0.010 - 0.003
    assert table.seconds(config, plan, reference).median == pytest.approx(rest + 0.005)
    speed = table.tokens_per_second(config, plan, reference)
    assert speed.median == pytest.approx(1 / (rest + 0.005))
    assert speed.p20 < speed.median < speed.p80
    assert table.tokens_per_second(config, reference, reference).median == pytest.approx(100)
    assert counted.totals == 1


def test_times_are_measured_once_and_read_back(counted: Counted) -> None:
    first = LatencyTable(1).layers([(INT4, SHAPE), (TRELLIS, SHAPE), (BARE, SHAPE)], 1 << 20)
    assert len(counted.asked) == 2  # transforms are the layer's, not the kernel's
    assert first[INT4, SHAPE] == first[BARE, SHAPE]
    assert LatencyTable(1).layer(TRELLIS, SHAPE, 1 << 20) == first[TRELLIS, SHAPE]
    assert len(counted.asked) == 2
    LatencyTable(2).layer(TRELLIS, SHAPE, 1 << 20)
    LatencyTable(1, again=True).layer(TRELLIS, SHAPE, 1 << 20)
    assert len(counted.asked) == 4


@pytest.mark.parametrize("damage", ["{", "nan", "version"])
def test_a_damaged_or_foreign_file_is_measured_again(
    counted: Counted, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = LatencyTable(1)
    table.layer(INT4, SHAPE, 1 << 20)
    content = json.loads(table.path.read_text())
    (key,) = content["layers"]
    if damage == "nan":
        content["layers"][key]["median"] = float("nan")
    elif damage == "version":
        content["bitpalette_version"] = "0"
    table.path.write_text("{" if damage == "{" else json.dumps(content))
    assert LatencyTable(1).layer(INT4, SHAPE, 1 << 20).median == 0.001
    assert len(counted.asked) == 2
    assert ("is unreadable" in capsys.readouterr().err) == (damage != "version")


def test_times_that_disagree_are_refused(counted: Counted) -> None:
    table, small = LatencyTable(1), {"a": (INT4, SHAPE)}
    table.rest(llama().config, {str(i): (TRELLIS, WIDE) for i in range(5)})  # 30 ms of layers in a step of 10
    with pytest.raises(PlanError, match="measure again"):
        table.tokens_per_second(llama().config, small, small)


def test_devices() -> None:
    check_device("cpu")
    words = "on a CPU only" if torch.cuda.is_available() else "no GPU here"
    with pytest.raises(PlanError, match=words) as caught:
        LatencyTable(device="cuda")
    assert "\n" not in str(caught.value)


def test_bytes_of_a_plan() -> None:
    assert weights_bytes({"a": (None, (3, 5))}) == 30


@native
def test_layers_are_timed_for_real() -> None:
    times = layer_times([INT4, TRELLIS, None], SHAPE, 1, 1 << 16)
    assert len(times) == 3
    assert all(0 < t.p20 <= t.median <= t.p80 < 1 for t in times)


@native
def test_a_model_of_random_codes_decodes() -> None:
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(2) for part in ("gate", "up")]
    model = random_model(config, dict.fromkeys(names, INT4))
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "QuantLinear"
    before = torch.get_num_threads()
    taken = step_times(model, 1, steps=3)
    assert 0 < taken.p20 <= taken.median <= taken.p80
    assert torch.get_num_threads() == before


@native
def test_a_model_without_a_native_decoder_is_refused() -> None:
    model = random_model(llama().config, {})
    model.register_forward_hook(lambda *args: None)
    with pytest.raises(PlanError, match="forward hooks"):
        step_times(model, 1)
