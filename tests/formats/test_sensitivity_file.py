"""Sensitivities on disk: what is written is read, and every file that is not one is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitpalette.formats.errors import FormatError
from bitpalette.formats.sensitivity_file import (
    Sensitivities,
    Sensitivity,
    read_sensitivities,
    write_sensitivities,
)

MEASURED = Sensitivities(
    {
        "q.weight": Sensitivity(0.5, 0.125, torch.tensor([1.0, 0.0, 2.5])),
        "experts.down_proj": Sensitivity(0.25, 0.0, torch.rand(2, 3)),
        "embed.weight": Sensitivity(0.75, 0.1, torch.zeros(0)),
        "tied.weight": Sensitivity(2.0, 0.5, torch.ones(5), 0.375, 0.0625),
    },
    model="ab" * 32,
    calibration="cd" * 32,
    sequences=8,
    seq_len=256,
    seed=3,
    dtype="float32",
)


@pytest.mark.parametrize("changes", [{}, {"method": "noise", "noise_energy": 0.01}])
def test_what_is_written_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = replace(MEASURED, **changes)
    write_sensitivities(tmp_path / "s.safetensors", written)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    found = read_sensitivities(tmp_path / "s.safetensors", MEASURED.model)
    assert found.tokens == 2048
    assert replace(found, weights={}).__dict__ == replace(written, weights={}).__dict__
    assert list(found.weights) == list(written.weights)
    for name, one in written.weights.items():
        got = found.weights[name]
        assert got.rows.dtype == torch.float32 and torch.equal(got.rows, one.rows)
        assert {**got.__dict__, "rows": 0} == {**one.__dict__, "rows": 0}


def test_another_model_is_refused(tmp_path: Path) -> None:
    write_sensitivities(tmp_path / "s.safetensors", MEASURED)
    with pytest.raises(FormatError, match=r"another model .fingerprint abab.*efef"):
        read_sensitivities(tmp_path / "s.safetensors", "ef" * 32)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Sensitivity(float("nan"), 0.0, torch.ones(2)), "alpha"),
        (Sensitivity(0.5, -1.0, torch.ones(2)), "alpha_se"),
        (Sensitivity(0.5, 0.0, torch.tensor([1.0, float("nan")])), "rows of w"),
        (Sensitivity(0.5, 0.0, torch.tensor([1.0, -1.0])), "rows of w"),
    ],
)
def test_bad_values_are_not_written(tmp_path: Path, one: Sensitivity, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_sensitivities(tmp_path / "s.safetensors", replace(MEASURED, weights={"w": one}))
    assert not list(tmp_path.iterdir())


def contents(**changes: Any) -> dict[str, Any]:
    values = {"model": "ab", "calibration": "cd", "tokens": 8, "sequences": 2, "seq_len": 4, "seed": 0}
    weights = {"w": {"alpha": 0.5, "alpha_se": 0.1}}
    return {"format_version": 1, **values, "dtype": "float32", "method": "fisher", "weights": weights} | changes


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (None, {}, "holds no sensitivities"),
        ("{", {}, "no JSON"),
        ("[]", {}, "sensitivities: Input should be"),
        (contents(format_version=2), {}, "newer bitpalette"),
        (contents(method="guess"), {}, "method: Input should be"),
        (contents(tokens=9), {}, "9 tokens are not 2 sequences of 4"),
        (contents(more=1), {}, "more: Extra inputs"),
        (contents(weights={"w": {"alpha": -1, "alpha_se": 0}}), {}, "weights.w.alpha: "),
        (contents(), {}, "'w:rows' is missing"),
        (contents(), {"v:rows": torch.ones(2)}, "'v:rows' .* is no row"),
        (contents(), {"w": torch.ones(2)}, "'w' .* is no row"),
        (contents(), {"w:rows": torch.ones(2, dtype=torch.float64)}, "is no row"),
        (contents(), {"w:rows": torch.ones(2, 2, 2)}, "is no row"),
        (contents(), {"w:rows": torch.tensor([1.0, float("nan")])}, "negative or not finite"),
        (contents(), {"w:rows": torch.tensor([1.0, -1.0])}, "negative or not finite"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, metadata: Any, tensors: dict[str, Any], message: str) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    told = {} if metadata is None else {"bitpalette_sensitivities": text}
    path = tmp_path / "s.safetensors"
    save_file(tensors or {"w:row": torch.ones(1)} if metadata is None else tensors, path, metadata=told)
    with pytest.raises(FormatError, match=message) as error:
        read_sensitivities(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_sensitivities(path, MEASURED)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        read_sensitivities(path)
