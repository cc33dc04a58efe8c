from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpalette.formats.errors import FormatError
from bitpalette.formats.manifest import MANIFEST_NAME, hash_file, is_complete, read_manifest, write_manifest
from bitpalette.formats.safetensors_file import SafetensorsFile
from bitpalette.formats.verify import verify

Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_a_sound_checkpoint_has_no_problem(make_native: Callable[..., Path]) -> None:
    path = make_native(max_shard_bytes=300)
    assert list(verify(path)) == []
    names = set(read_manifest(path).files)
    assert names == {p.name for p in path.iterdir()} - {MANIFEST_NAME}


@pytest.mark.parametrize("stored", [Q, Q + "_scale", EXPERTS, "model.norm.weight"])
def test_one_flipped_bit_names_file_and_tensor(make_native: Callable[..., Path], stored: str) -> None:
    path = make_native() / "model.safetensors"
    first, last = SafetensorsFile(path).byte_range(stored)
    content = bytearray(path.read_bytes())
    content[last - 1] ^= 1
    path.write_bytes(content)
    assert [(p.file, p.tensor) for p in verify(path.parent)] == [("model.safetensors", stored)]
    assert first < last


def test_other_damage_is_named(make_native: Callable[..., Path]) -> None:
    path = make_native()
    (path / "tokenizer.json").write_text("[]")
    assert [str(p) for p in verify(path)] == ["tokenizer.json: changed since it was written"]
    (path / "tokenizer.json").write_text("longer")
    assert "6 bytes, 2 were written" in str(next(verify(path))) and not is_complete(path)
    (path / "tokenizer.json").unlink()
    assert str(next(verify(path))) == "tokenizer.json: missing" and not is_complete(path)


def test_truncated_weights(make_native: Callable[..., Path]) -> None:
    path = make_native() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    problems = list(verify(path.parent))
    assert problems[0].file == "model.safetensors" and "truncated" in problems[0].what


def test_no_manifest(make_native: Callable[..., Path], tmp_path: Path) -> None:
    assert "incomplete" in str(next(verify(make_native(manifest=False))))
    assert "no such directory" in str(next(verify(tmp_path / "none")))


@pytest.mark.parametrize("name", [Q + "_scale", EXPERTS + "_scale", "model.norm.weight"])
def test_nan_is_found_though_the_hashes_agree(make_native: Callable[..., Path], name: str) -> None:
    path = make_native()
    stored = load_file(path / "model.safetensors")
    stored[name].view(-1)[5] = torch.nan
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    write_manifest(path)
    problems = list(verify(path))
    assert problems[0].tensor == name and "1 of" in problems[0].what and problems[0].file == "model.safetensors"
    if name != "model.norm.weight":  # and what it decodes to
        assert problems[1].tensor == name.removesuffix("_scale") and "decoded values" in problems[1].what


def test_the_manifest_refuses_unfinished_files(make_native: Callable[..., Path]) -> None:
    path = make_native(manifest=False)
    (path / "model.safetensors.partial").write_bytes(b"")
    with pytest.raises(FormatError, match="unfinished"):
        write_manifest(path)
    assert not is_complete(path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1}', '{"version": 1, "files": {"../x": {"size": 1, "sha256": ""}}}']
)
def test_a_broken_manifest(make_native: Callable[..., Path], text: str) -> None:
    path = make_native()
    (path / MANIFEST_NAME).write_text(text)
    assert not is_complete(path)
    with pytest.raises(FormatError, match=r"manifest.json"):
        read_manifest(path)


def test_checksums_do_not_depend_on_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({str(n): torch.arange(n, dtype=torch.uint8) for n in (0, 1, 5, 64, 17)}, path)
    whole = hash_file(path)
    for chunk in (1, 7, 64):
        monkeypatch.setattr("bitpalette.formats.manifest.CHUNK", chunk)
        assert hash_file(path) == whole
    assert whole.tensors is not None and len(set(whole.tensors.values())) == 5


def test_the_manifest_is_deterministic(make_native: Callable[..., Path]) -> None:
    path = make_native()
    first = (path / MANIFEST_NAME).read_bytes()
    write_manifest(path)
    assert (path / MANIFEST_NAME).read_bytes() == first and json.loads(first)["version"] == 1
