from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitpalette.formats.base import Source, open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.manifest import is_complete, write_manifest
from bitpalette.formats.native import (
    FORMAT_VERSION,
    NativeConfig,
    NativeSource,
    build_entries,
    open_native,
    stored_name,
    stored_specs,
)
from bitpalette.quant.codec import codec_names, get_codec
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.tensor import QuantizedTensor

Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
INT4 = Scheme.from_dict({"codec": "int", "bits": 4})


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((path / "config.json").read_text())
    edit(values["quantization_config"])
    (path / "config.json").write_text(json.dumps(values))
    write_manifest(path)


@pytest.mark.parametrize("transforms", [(), ("rotate",)])
@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("limit", [10**9, 300])
def test_round_trip(
    make_native: Callable[..., Path], weights: dict[str, Tensor], codec: str, transforms: tuple[str, ...], limit: int
) -> None:
    scheme = get_codec(codec).scheme_class(transforms=transforms)
    source = open_native(make_native(scheme, max_shard_bytes=limit))
    assert source.quantized_names == [Q, EXPERTS]
    assert source.quantization.schemes == [scheme.to_dict()] and source.quantization.seed == 3
    seen = dict(source)
    assert set(seen) == set(weights) == set(source.tensors)
    for name, w in weights.items():
        got = seen[name]
        assert source.tensors[name].shape == tuple(w.shape)
        if isinstance(got, QuantizedTensor):
            assert name in (Q, EXPERTS) and got.scheme == scheme and got.shape == tuple(w.shape)
            assert source.tensors[name].nbytes == got.nbytes
            error = (got.dequantize() - w.float()).norm() / w.float().norm()
            assert float(error) < 0.9  # the right weight at all; how well is the codec's own test
            assert torch.equal(source.read(name), got.dequantize(torch.bfloat16))
        else:
            assert torch.equal(got, w) and torch.equal(source.read(name), w)


def test_codes_stand_under_the_parameters_own_name_flat(make_native: Callable[..., Path]) -> None:
    path = make_native()
    stored = load_file(path / "model.safetensors")
    assert stored[Q].dtype == torch.uint8 and stored[Q].shape == (24 * 12,)
    assert stored[Q + "_scale"].shape == (24, 2) and stored[EXPERTS + "_scale"].shape == (3, 10, 2)
    assert stored_name(Q, "codes") == Q and stored_name(Q, "zero_point") == Q + "_zero_point"


def test_is_a_source(make_native: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(make_native())
    assert isinstance(source, NativeSource) and isinstance(source, Source)
    assert source.write_sidecar(tmp_path / "out") == ["tokenizer.json"] and source.sidecar_bytes() == 2
    assert len(source.fingerprint()) == 64 and source.size_bytes > 0


def test_without_manifest_it_is_incomplete(make_native: Callable[..., Path]) -> None:
    path = make_native(manifest=False)
    assert not is_complete(path)
    with pytest.raises(FormatError, match=r"incomplete: no manifest.json"):
        open_source(path)
    write_manifest(path)
    assert is_complete(path) and open_native(path).quantized_names


def test_a_newer_format_is_refused_whatever_else_it_holds(make_native: Callable[..., Path]) -> None:
    path = make_native()
    edit_config(
        path, lambda q: (q.clear(), q.update(quant_method="bitpalette", format_version=FORMAT_VERSION + 1, x=1))
    )
    with pytest.raises(FormatError, match=r"newer bitpalette .format 2, this one reads up to 1.; upgrade"):
        open_native(path)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda q: q["schemes"][0].update(codec="nope"), "unknown codec 'nope'"),
        (lambda q: q["schemes"][0].update(bits=99), "bits"),
        (lambda q: q["schemes"][0].update(colour=1), "no parameter 'colour'"),
        (
            lambda q: q["schemes"][0].update(bits=3),
            f"'{Q}' is torch.uint8 .288.; int bits=3 .* needs torch.uint8 .216.",
        ),
        (lambda q: q["schemes"][0].update(symmetric=False), f"'{Q}_zero_point' .* is missing"),
        (lambda q: q["tensors"][Q].update(scheme=5), "scheme 5 of 1"),
        (lambda q: q["tensors"][Q].update(scheme=-1), "scheme"),
        (lambda q: q["tensors"][Q].update(shape=[24, 25]), f"tensor '{Q}"),
        (lambda q: q["tensors"][Q].update(shape=[24, 0]), "shape"),
        (lambda q: q["tensors"][Q].update(shape=[24]), "shape"),
        (lambda q: q["tensors"][Q].update(shape=[2**39, 2**39, 2**39]), f"tensor '{Q}'"),
        (lambda q: q["tensors"].update(ghost={"scheme": 0, "shape": [24, 24]}), "tensor 'ghost' .* is missing"),
        (lambda q: q.update(format_version=0), "format_version 0"),
        (lambda q: q.update(format_version="one"), "format_version"),
        (lambda q: q.pop("schemes"), "schemes"),
        (lambda q: q.update(surprise=1), "surprise"),
    ],
)
def test_a_config_that_lies(
    make_native: Callable[..., Path], edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = make_native()
    edit_config(path, edit)
    with pytest.raises(FormatError, match=says) as error:
        open_native(path)
    assert "\n" not in str(error.value)


def test_fields_that_disagree_name_file_and_tensor(make_native: Callable[..., Path]) -> None:
    path = make_native()
    stored = load_file(path / "model.safetensors")
    stored[Q + "_scale"] = stored[Q + "_scale"].float()
    save_file(stored, path / "model.safetensors")
    write_manifest(path)
    with pytest.raises(FormatError, match=f"model.safetensors: tensor '{Q}_scale' is torch.float32 .24, 2."):
        open_native(path)


def test_not_native(plain: Path) -> None:
    with pytest.raises(FormatError, match="not a bitpalette checkpoint"):
        open_native(plain)


def test_config_stores_each_scheme_once() -> None:
    other = Scheme.from_dict({"codec": "int", "bits": 2})
    config = NativeConfig.build(
        {"a": (INT4, (8, 16)), "b": (other, (2, 8, 16)), "c": (INT4, (8, 8))},
        bitpalette_version="1.2",
        produced_by={"x": 1},
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values["quant_method"] == "bitpalette" and values["format_version"] == FORMAT_VERSION
    assert values["schemes"] == [INT4.to_dict(), other.to_dict()] and values["produced_by"] == {"x": 1}
    assert values["tensors"]["b"] == {"scheme": 1, "shape": [2, 8, 16]}
    again = NativeConfig.parse(values, "config.json")
    assert again == config and again.scheme_of("b") == other
    assert stored_specs(again)["b"] == ((2 * 8 * 4,), torch.uint8)
    assert stored_specs(again)["b_scale"] == ((2, 8, 1), torch.float16)


def test_entries_follow_the_models_order() -> None:
    config = NativeConfig.build({"b": (INT4, (8, 16))}, bitpalette_version="1")
    tensors = [("a", (3,), torch.float32), ("b", (8, 16), torch.bfloat16), ("c", (2,), torch.bfloat16)]
    assert [entry[0] for entry in build_entries(tensors, config)] == ["a", "b", "b_scale", "c"]
    with pytest.raises(FormatError, match="'b' is not a tensor of the model"):
        build_entries(tensors[:1], config)
    with pytest.raises(FormatError, match="'b' has shape"):
        build_entries([("b", (8, 17), torch.bfloat16)], config)
