"""What `--kv SPEC` means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from bitpalette.calibrate.kv_allocate import PAIRS, name_of
from bitpalette.formats.kv_plan_file import KVCalibration, LayerSensitivity, StoredKVPlan, write_kv_plan
from bitpalette.kv_load import packed_layers, plan_from_spec, stored_from_spec
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan

CONFIG = LlamaConfig(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
PLAN = KVPlan(KVFormat(3, 3, 8, 32), {1: KVFormat(4, 2, 8, 32)}, {0: torch.randn(2, 16), 3: torch.randn(2, 16)})


def sensitivity(slope: float) -> LayerSensitivity:
    errors = {512: {name_of(p): 2 * 4.0 ** -p[0] + 4.0 ** -p[1] for p in PAIRS if p != (16, 16)}}
    return LayerSensitivity(kv_heads=2, head_dim=16, head_dim_v=16, slope_k=slope, slope_v=slope, errors=errors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a plan, and sensitivities that rise from layer to layer."""
    layers = {i: sensitivity(10.0**i) for i in range(4)}
    calibration = KVCalibration(model="a", text="b", text_name="c", tokens=512, lengths=[512], layers=layers)
    write_kv_plan(tmp_path / "with", StoredKVPlan(PLAN, calibration))
    return tmp_path / "with"


def same_means(plan: KVPlan | None) -> bool:
    return plan is not None and {n: t.tolist() for n, t in plan.means.items()} == {
        n: t.tolist() for n, t in PLAN.means.items()
    }


@pytest.mark.parametrize("spec", [None, "plan", " plan "])
def test_the_checkpoints_plan(folder: Path, spec: str | None) -> None:
    plan = plan_from_spec(spec, folder, CONFIG)
    assert same_means(plan)
    assert plan is not None and plan.default == PLAN.default and plan.layers == PLAN.layers


@pytest.mark.parametrize("spec", ["k4v2", "K4V2"])
def test_a_format_keeps_means_sinks_and_window(folder: Path, spec: str) -> None:
    plan = plan_from_spec(spec, folder, CONFIG)
    assert same_means(plan)
    assert plan is not None and plan.default == KVFormat(4, 2, 8, 32) and not plan.layers


def test_without_a_plan(tmp_path: Path) -> None:
    for place in (tmp_path, None, "some/hub-id"):
        assert plan_from_spec(None, place, CONFIG) is None
        assert plan_from_spec("16", place, CONFIG) is None
        plan = plan_from_spec("k3v2", place, CONFIG)
        assert plan is not None and plan.default == KVFormat(3, 2) and not plan.means


def test_off(folder: Path) -> None:
    assert plan_from_spec("16", folder, CONFIG) is None


def test_auto_is_solved_from_the_sensitivities(folder: Path) -> None:
    for bits in (3.25, 4.6, 6):
        stored = stored_from_spec(f"auto:{bits}", folder, CONFIG)
        assert stored is not None and stored.calibration is not None and same_means(stored.plan)
        forms = [stored.plan.format_of(i) for i in range(4)]
        assert bits - 0.6 < sum(f.bits_per_element(16) for f in forms) / 4 <= bits
        assert {(f.sinks, f.window) for f in forms} == {(8, 32)}
        assert [f.bits_k + f.bits_v for f in forms] == sorted(f.bits_k + f.bits_v for f in forms)


def test_the_plan_of_another_place(folder: Path, tmp_path: Path) -> None:
    for place in (folder, folder / "bitpalette_kv.safetensors"):
        for spec, default in (("plan", PLAN.default), ("", PLAN.default), ("k8v8", KVFormat(8, 8, 8, 32))):
            plan = plan_from_spec(f"{spec}@{place}", tmp_path, CONFIG)
            assert same_means(plan) and plan is not None and plan.default == default
    assert plan_from_spec(f"auto:3.5@{folder}", None, CONFIG) is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("plan", r"has no bitpalette_kv\.safetensors; write one with `quantize plan-kv`"),
        ("auto:3.25", "is solved from measured sensitivities, and .* has no"),
        ("auto:two", "bits an element are above 2 and at most 16"),
        ("auto:nan", "bits an element are above 2 and at most 16"),
        ("auto:1", "bits an element are above 2 and at most 16"),
        ("auto", "say how many bits an element"),
        ("k5v4", "bits_k=5 is not one of"),
        ("small", "'small' names no format"),
        ("", "has no bitpalette_kv"),
        ("plan@nowhere", "there is no 'nowhere'"),
    ],
)
def test_refusals(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(KVError, match=message) as error:
        plan_from_spec(spec, tmp_path, CONFIG)
    assert "\n" not in str(error.value)


def test_sensitivities_are_needed(tmp_path: Path) -> None:
    write_kv_plan(tmp_path, StoredKVPlan(PLAN))
    with pytest.raises(KVError, match="has a plan without sensitivities; run `quantize plan-kv` on it"):
        plan_from_spec("auto:3.25", tmp_path, CONFIG)


def test_the_plan_of_another_model(folder: Path) -> None:
    with pytest.raises(KVError, match=r"the plan names layers \[1, 3\]"):
        plan_from_spec(None, folder, LlamaConfig(num_hidden_layers=1))


def test_only_layers_that_attend_to_all_tokens() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(num_hidden_layers=3, sliding_window=8, layer_types=types)
    assert packed_layers(config) == [1]
    assert packed_layers(CONFIG) == [0, 1, 2, 3]
