"""The model card, and how it says that a checkpoint is made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitpalette.calibrate.card import base_model, model_card, plus_minus, write_card
from bitpalette.calibrate.reproduction import calibration_text, reproduction
from bitpalette.calibrate.text import Calibration
from bitpalette.calibrate.weight_kinds import block_of, kinds_of, part_of
from bitpalette.formats.errors import FormatError

PLAN = {
    "format_version": 1,
    "command": "quantize plan org/tiny --bits 3",
    "model": "m",
    "text": "t",
    "text_name": "prose",
    "tokens": 1024,
    "budget": {"bits": 3.0},
    "plan": {},
    "weights": {},
    "bytes": {"linear": 1, "head": 1, "embedding": 1, "other": 1, "file": 4},
    "bits_per_weight": 3.0,
    "solver": {"seconds": 0.1, "gap": 0.0, "bound": 0.1, "exact": True, "candidates": 3, "items": 3},
    "predicted": {"kl": 0.11, "kl_se": 0.01, "perplexity": 25.0, "reference_perplexity": 23.3},
    "measured": {"kl": 0.112, "kl_se": 0.002, "perplexity": 25.2, "top1": 0.825, "text_name": "prose", "tokens": 16384},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What stands beside the weights of a checkpoint of three weights."""
    layers = [
        {
            "parameter": "model.layers.0.mlp.up_proj.weight",
            "scheme": "int bits=2",
            "shape": [4, 8],
            "bits_per_weight": 2.5,
        },
        {
            "parameter": "model.layers.1.mlp.up_proj.weight",
            "scheme": "int bits=4",
            "shape": [4, 8],
            "bits_per_weight": 4.5,
        },
        {"parameter": "lm_head.weight", "scheme": "int bits=8", "shape": [16, 8], "bits_per_weight": 8.0},
    ]
    report = {
        "job": {"plan": {"solver": "ldlq", "tune": True}, "calibration": None, "bitpalette_version": "9.9"},
        "source": {"name": "org/tiny", "bytes": 4_000_000},
        "layers": layers,
    }
    (tmp_path / "quantization_report.json").write_text(json.dumps(report))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1_250_000)
    return tmp_path


def test_the_card_has_what_a_reader_needs(folder: Path) -> None:
    import yaml

    card = model_card(folder)
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "transformers" and values["base_model"] == "org/tiny"
    assert "bitpalette" in values["tags"]
    assert "license" not in values, "it is the user's to state"
    assert "from_pretrained(" in body and "pip install bitpalette" in body
    assert "1.2 MB, from 4.0 MB" in body
    bits = (32 * 2.5 + 32 * 4.5 + 128 * 8) / 192
    assert f"{bits:.3f}, average of 3 quantized weights" in body
    assert "| up_proj | 2 | 3.500 | 2.500 | 4.500 | `int bits=2`, `int bits=4` |" in body
    assert body.index("| up_proj") < body.index("| lm_head")
    assert "`ldlq`, then tuned" in body
    assert "measures them" in body and "predicted" not in body


def test_predicted_stands_beside_measured(folder: Path) -> None:
    (folder / "quantization_plan.json").write_text(json.dumps(PLAN))
    card = model_card(folder)
    assert "| KL, nats a token | 0 | 0.1100 ± 0.0100 | 0.1120 ± 0.0020 |" in card
    assert "| perplexity | 23.30 | 25.00 | 25.20 |" in card
    assert "Measured on prose, 16,384 tokens" in card and "82.5%" in card
    assert "`quantize plan org/tiny --bits 3`" in card
    (folder / "quantization_plan.json").write_text(json.dumps(PLAN | {"measured": None}))
    unmeasured = model_card(folder)
    assert "Not measured yet." in unmeasured and "| KL, nats a token | 0 | 0.1100 ± 0.0100 |  |" in unmeasured


def test_a_card_without_quantization(folder: Path) -> None:
    (folder / "quantization_report.json").write_text('{"job": {}, "layers": []}')
    write_card(folder)
    assert "without quantization" in (folder / "README.md").read_text()


def test_a_report_without_shapes_is_refused(folder: Path) -> None:
    (folder / "quantization_report.json").write_text(
        '{"layers": [{"parameter": "a.0.b.weight", "bits_per_weight": 2}]}'
    )
    with pytest.raises(FormatError, match=r"no record of a weight.*write it again"):
        model_card(folder)


def test_sizes_of_shards_add_up(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x" * 2_000_000)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "| weight files | 3.3 MB, from 4.0 MB |" in model_card(folder)


def test_what_the_card_says_makes_the_checkpoint_again(checkpoint: Callable[..., Path], compilation: Any) -> None:
    model = checkpoint("llama")
    first, again = model.parent / "first", model.parent / "again"
    compilation(model, first, solver="gptq", bits=3, seed=5).run()
    card = (first / "README.md").read_text()
    code = card.split("To make it again:\n\n```python\n")[1].split("\n```")[0]
    assert 'Calibration("builtin", 128, 32, 0)' in code
    code = code.replace('"MODEL"', repr(str(model))).replace('"OUT"', repr(str(again)))
    exec(code.replace('"quantization_report.json"', repr(str(first / "quantization_report.json"))), {})
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_options_that_are_not_the_usual_are_named() -> None:
    calibration = {"text": "0" * 64, "tokens": 4096, "seq_len": 256, "seed": 3}
    job = {"calibration": calibration, "stats": "of the original model", "dtype": "bfloat16", "device": "cpu",
           "tune_seconds": 90.0, "max_shard_bytes": 1000}  # fmt: skip
    code = reproduction(job)
    assert 'calibration=bitpalette.Calibration("TEXT", 4096, 256, 3)' in code
    assert 'stats="STATS"' in code and "dtype='bfloat16'" in code and "tune_seconds=90.0" in code
    assert "max_shard_bytes=1000" in code and "device" not in code
    assert "fingerprint 000000000000" in calibration_text(calibration)
    own = {"text": Calibration("self", 64, 32, 1).fingerprint(), "tokens": 64, "seq_len": 32, "seed": 1}
    assert calibration_text(own).startswith("text that the model wrote itself, 64 tokens")
    assert calibration_text(None).startswith("none")


def test_the_original_is_named_by_its_hub_id_alone(tmp_path: Path) -> None:
    def source(path: str, name: Any = None) -> Any:
        return SimpleNamespace(path=Path(path), config={} if name is None else {"_name_or_path": name})

    assert base_model(source("/cache/models--org--tiny-2B/snapshots/0123")) == "org/tiny-2B"
    assert base_model(source("model", "org/tiny")) == "org/tiny"
    assert base_model(source("model", "/home/me/tiny")) is None
    assert base_model(source("/home/me/tiny")) is None


def test_values_have_the_digits_that_they_need() -> None:
    assert plus_minus(0.112, 0.002) == "0.1120 ± 0.0020"
    assert plus_minus(0.00112, None) == "0.001120"
    assert plus_minus(123.4, 1.0) == "123.4 ± 1.0"
    assert plus_minus(0.0, None) == "0.0000"


def test_names_tell_block_kind_and_part() -> None:
    names = [
        "model.layers.11.mlp.up_proj.weight",
        "model.layers.11.mlp.shared_experts.up_proj.weight",
        "model.layers.11.self_attn.q_proj.weight",
        "model.layers.11.mlp.experts.down_proj",
        "lm_head.weight",
        "transformer.wte.weight",
    ]
    assert [block_of(name) for name in names] == [11, 11, 11, 11, None, None]
    kinds = ["mlp.up_proj", "shared_experts.up_proj", "q_proj", "down_proj", "lm_head", "wte"]
    assert list(kinds_of(names).values()) == kinds
    assert [part_of(name) for name in names] == ["linear"] * 4 + ["head", "embedding"]
