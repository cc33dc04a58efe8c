"""The plan of a cache on disk: what is written is read, and every file that is not one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitpalette.formats import kv_plan_file
from bitpalette.formats.errors import FormatError
from bitpalette.formats.kv_plan_file import (
    KV_PLAN_NAME,
    KVCalibration,
    LayerSensitivity,
    Mix,
    StoredKVPlan,
    kv_plan_path,
    prepare_place,
    read_kv_plan,
    write_kv_plan,
)
from bitpalette.formats.manifest import is_complete, read_manifest, write_manifest
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.kv_plan import KVPlan

SENSITIVITY = LayerSensitivity(
    kv_heads=2, head_dim=16, head_dim_v=8, slope_k=1.5, slope_v=0.25, errors={512: {"k4v4": 1e-3}, 2048: {"k4v4": 2e-3}}
)
CALIBRATION = KVCalibration(
    model="ab",
    text="cd",
    text_name="valid.txt",
    tokens=4096,
    lengths=[512, 2048],
    layers={0: SENSITIVITY, 2: SENSITIVITY},
    sink_mass=[0.25, 0.125],
    sinks_error={0: 0.5, 4: 0.25},
    mixes=[Mix(formats=["k4v4", "k3v2"], predicted=0.5, measured=0.75)],
    spearman=0.9,
    budget="3.25 bits an element",
    predicted=0.02,
)


def stored(calibration: KVCalibration | None = CALIBRATION) -> StoredKVPlan:
    means = {0: torch.randn(2, 16), 2: torch.randn(2, 16, dtype=torch.float64)}
    layers = {0: KVFormat(4, 2, 8, 32), 2: KVFormat(16, 16, 8, 32)}
    return StoredKVPlan(KVPlan(KVFormat(3, 3, 8, 32), layers, means), calibration)


@pytest.mark.parametrize("calibration", [CALIBRATION, None])
def test_what_is_written_is_read(tmp_path: Path, calibration: KVCalibration | None) -> None:
    plan = stored(calibration)
    path = write_kv_plan(tmp_path, plan, "1.2")
    assert path == tmp_path / KV_PLAN_NAME
    assert [p.name for p in tmp_path.iterdir()] == [KV_PLAN_NAME]
    for place in (tmp_path, path):
        found = read_kv_plan(place)
        assert found is not None
        assert found.plan.default == plan.plan.default and found.plan.layers == plan.plan.layers
        assert found.calibration == calibration
        assert set(found.plan.means) == {0, 2}
        for layer, mean in found.plan.means.items():
            assert mean.dtype == torch.float32 and torch.equal(mean, plan.plan.means[layer].float())


def test_places(tmp_path: Path) -> None:
    assert read_kv_plan(tmp_path) is None
    file = tmp_path / "deep" / "mine.safetensors"
    assert kv_plan_path(file) == prepare_place(file) == write_kv_plan(file, stored()) == file
    assert write_kv_plan(tmp_path / "new", stored()) == tmp_path / "new" / KV_PLAN_NAME
    with pytest.raises(FormatError, match="cannot be read"):
        read_kv_plan(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a folder")
    with pytest.raises(FormatError, match="cannot be made"):
        prepare_place(tmp_path / "text" / "plan.safetensors")


def test_the_manifest_lists_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    write_kv_plan(tmp_path, stored())
    first = read_manifest(tmp_path).files[KV_PLAN_NAME]
    assert is_complete(tmp_path)
    write_kv_plan(tmp_path, stored(None))
    second = read_manifest(tmp_path).files
    assert is_complete(tmp_path) and second[KV_PLAN_NAME] != first and "config.json" in second


def test_interrupted_the_checkpoint_stays_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    write_kv_plan(tmp_path, stored())

    def fail(*_: Any) -> None:
        raise FormatError("disk full")

    monkeypatch.setattr(kv_plan_file, "hash_file", fail)  # after the new plan is in its place
    with pytest.raises(FormatError, match="disk full"):
        write_kv_plan(tmp_path, stored(None))
    assert is_complete(tmp_path)
    found = read_kv_plan(tmp_path)
    assert found is not None and found.calibration is None


def contents(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "default": KVFormat().to_dict(), "layers": {}, "calibration": None} | changes


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no plan of a KV cache"),
        ("{", "is no JSON"),
        ("[]", "plan: Input should be"),
        (contents(version=2), "written by a newer bitpalette"),
        (contents(version="x"), "version: Input should be"),
        (contents(default={"bits_k": 5}), "bits_k=5 is not one of"),
        (contents(default={"bits": 4}), "a cache format has no"),
        (contents(default=4), "default: Input should be"),
        (contents(layers={"0": {"window": "all"}}), "window='all' is not a number"),
        (contents(layers={"first": KVFormat().to_dict()}), "layers.first"),
        (contents(more=1), "more: Extra inputs"),
        (contents(calibration=CALIBRATION.model_dump(mode="json") | {"spearman": 7}), "calibration.spearman"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, metadata: Any, message: str) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    told = {} if metadata is None else {"bitpalette_kv": text}
    save_file({"layers.0.mean": torch.zeros(1, 8)}, tmp_path / KV_PLAN_NAME, metadata=told)
    with pytest.raises(FormatError, match=message) as error:
        read_kv_plan(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.scale", torch.zeros(1, 8), "is no mean of keys"),
        ("layers.x.mean", torch.zeros(1, 8), "is no mean of keys"),
        ("layers.0.mean", torch.zeros(8), "is no mean of keys"),
        ("layers.0.mean", torch.zeros(1, 8, dtype=torch.float16), "is no mean of keys"),
        ("layers.0.mean", torch.full((1, 8), float("nan")), "is not finite"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    save_file({name: tensor}, tmp_path / KV_PLAN_NAME, metadata={"bitpalette_kv": json.dumps(contents())})
    with pytest.raises(FormatError, match=message):
        read_kv_plan(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write_kv_plan(tmp_path, stored())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        read_kv_plan(tmp_path)
