from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitpalette.formats.base import Source, formats, open_source
from bitpalette.formats.directory import DirectorySource
from bitpalette.formats.errors import FormatError
from bitpalette.formats.shards import INDEX_NAME, ShardWriter, plan_shards


@pytest.fixture
def sharded(plain: Path, weights: dict[str, Tensor]) -> Path:
    (plain / "model.safetensors").unlink()
    plan = plan_shards([(n, w.shape, w.dtype) for n, w in weights.items()], 1000)
    assert len(plan.shards) > 2
    with ShardWriter(plain, plan) as writer:
        for name, w in weights.items():
            writer.write(name, w)
        writer.finish()
    return plain


def edit_index(path: Path, **changes: object) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"].update(changes)
    (path / INDEX_NAME).write_text(json.dumps(index))


def test_the_formats_are_found() -> None:
    assert list(formats()) == ["directory", "gguf", "hub", "native"]


@pytest.mark.parametrize("layout", ["plain", "sharded"])
def test_reads_every_tensor(layout: str, request: pytest.FixtureRequest, weights: dict[str, Tensor]) -> None:
    path = request.getfixturevalue(layout)
    source = open_source(path)
    assert isinstance(source, Source) and source.config["model_type"] == "llama"
    assert set(source.tensors) == set(weights)
    for name, w in weights.items():
        assert torch.equal(source.read(name), w) and source.tensors[name].shape == tuple(w.shape)
    assert source.size_bytes == sum(p.stat().st_size for p in path.glob("*.safetensors"))


def test_sidecar_carries_what_is_not_weights(plain: Path, tmp_path: Path) -> None:
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tool.jinja").write_text("t")
    (plain / "original").mkdir()
    (plain / "original" / "params.json").write_text("{}")
    (plain / "model.safetensors.partial").write_bytes(b"")
    source = open_source(plain)
    expected = [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    ]
    out = tmp_path / "out"
    assert source.write_sidecar(out) == expected
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert sorted(files) == expected and sum(map(len, files.values())) == source.sidecar_bytes()


def test_fingerprint_follows_the_content(plain: Path, weights: dict[str, Tensor]) -> None:
    first = open_source(plain).fingerprint()
    (plain / "model.safetensors").touch()
    assert open_source(plain).fingerprint() == first
    weights["model.norm.weight"][3] = 2
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    second = open_source(plain).fingerprint()
    assert second != first
    (plain / "config.json").write_text("{}")
    assert open_source(plain).fingerprint() not in (first, second)


def test_a_shard_may_hold_more_than_the_index_says(sharded: Path, weights: dict[str, Tensor]) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]  # its shard has other tensors: transformers loads the whole shard
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    shard = index["weight_map"]["model.layers.0.mlp.experts.gate_up_proj"]
    save_file(
        {n: weights[n] for n in ("model.layers.0.mlp.experts.gate_up_proj", "model.norm.weight")}, sharded / shard
    )
    assert torch.equal(open_source(sharded).read("model.norm.weight"), weights["model.norm.weight"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": "model-00009-of-00009.safetensors"}, "'model-00009-of-00009.safetensors', which is missing"),
        ({"x": "model-00001-of-00004.safetensors"}, "tensor 'x' is not in model-00001-of-00004"),
        ({"x": "../model.safetensors"}, "no file name"),
        ({"x": 3}, "no file name"),
    ],
)
def test_an_index_that_lies(sharded: Path, changes: dict[str, object], says: str) -> None:
    edit_index(sharded, **changes)
    with pytest.raises(FormatError, match=says):
        open_source(sharded)


def test_a_tensor_in_two_shards(sharded: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, sharded / "more.safetensors")
    edit_index(sharded, extra="more.safetensors")
    with pytest.raises(FormatError, match="is in both"):
        open_source(sharded)


def test_an_index_without_weight_map(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text("{}")
    with pytest.raises(FormatError, match="no weight_map"):
        open_source(sharded)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_quantized_by_others(plain: Path, method: str) -> None:
    (plain / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(FormatError, match=f"already quantized with '{method}'"):
        open_source(plain)


@pytest.mark.parametrize("text", ["{", "[]", "\0", '{"a": 1', "[" * 100_000])
def test_broken_config(plain: Path, text: str) -> None:
    (plain / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config.json"):
        open_source(plain)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for prepare, says in [
        (lambda: None, "no config.json"),
        (lambda: (tmp_path / "config.json").write_text("{}"), "no model.safetensors"),
        (lambda: (tmp_path / "m.gguf").write_bytes(b"GGUF"), "give the path of that file"),
        (lambda: (tmp_path / "pytorch_model.bin").write_bytes(b"x"), "convert it to safetensors"),
    ]:
        prepare()
        with pytest.raises(FormatError, match=says) as error:
            open_source(tmp_path)
        assert "\n" not in str(error.value)


def test_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(FormatError, match="no such model: '/nowhere/at/all'"):
        open_source("/nowhere/at/all")
    with pytest.raises(FormatError, match="no checkpoint"):
        open_source(tmp_path / "text.txt")


def test_a_corrupt_file_inside_is_named(plain: Path) -> None:
    data = (plain / "model.safetensors").read_bytes()
    (plain / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(FormatError, match=r"model.safetensors: .*truncated"):
        DirectorySource(plain)
