"""A model without weights: what is loaded when, what is let go, and what does not belong together."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.calibrate.whole import load_model
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError


def test_every_family(checkpoint: Callable[..., Path], families: Any, family: str, ids: torch.Tensor) -> None:
    source = open_source(checkpoint(family))
    original = families[family]()
    skeleton = Skeleton(source)
    assert len(skeleton.blocks) == 2
    assert all(p.is_meta for p in skeleton.model.parameters())
    parts = [skeleton.parameters_of(block) for block in (0, 1, None)]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == sorted(skeleton.parameters)
    parameters = dict(original.named_parameters())
    assert set(skeleton.parameters) >= {n for n in parameters if n not in skeleton.tied}
    for block, part in zip((0, 1, None), parts, strict=True):
        assert {skeleton.block_of(name) for name in part} == {block}
        with skeleton.loaded(part) as loaded:
            assert list(loaded) == part
            for name in part:
                assert torch.equal(loaded[name], parameters[name]), name
            elsewhere = set(skeleton.parameters) - set(part)
            assert all(skeleton.get(name).is_meta for name in elsewhere if name in parameters)
        assert all(p.is_meta for p in skeleton.model.parameters())
    with torch.no_grad():
        whole = load_model(source)
        assert torch.equal(whole(ids).logits, original(ids).logits)
        assert {p.requires_grad for p in whole.parameters()} == {False}


def test_released_after_an_error(checkpoint: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_source(checkpoint("llama")))
    with pytest.raises(KeyError), skeleton.loaded(skeleton.parameters_of(0)):
        raise KeyError
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_cast_and_put(checkpoint: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_source(checkpoint("llama", torch.bfloat16)))
    names = skeleton.parameters_of(1)
    with skeleton.loaded(names) as loaded:
        skeleton.cast(names, torch.float32)
        assert {skeleton.get(n).dtype for n in names} == {torch.float32}
        assert {loaded[n].dtype for n in names} == {torch.bfloat16}  # the originals are as they were
        skeleton.put(names[0], torch.ones(3))
        assert torch.equal(skeleton.get(names[0]), torch.ones(3))
    assert skeleton.get(names[0]).is_meta and skeleton.get(names[0]).dtype == torch.bfloat16


def change(path: Path, **values: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 80}, r"has shape \[\d+(, \d+)?\], but its config.json makes it .*do not belong together"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.* and 8 more tensors"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.* makes 1 blocks"),
        ({"num_hidden_layers": 0}, "config.json|no list of repeated blocks|model.layers"),
        ({"num_hidden_layers": 10**9}, "makes 1000000000 layers, the checkpoint has 21 tensors"),
        ({"model_type": "nonsuch"}, "model_type 'nonsuch' is not one"),
        ({"model_type": None}, "model_type 'None' is not one"),
        ({"architectures": ["Nonsuch"]}, "has no architecture 'Nonsuch'"),
        ({"architectures": [5]}, "has no architecture '5'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": ["float32"]}, "dtype is"),
        ({"num_attention_heads": "four"}, "config.json makes no model"),
    ],
)
def test_configs_that_lie(values: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    path = change(checkpoint("llama"), **values)
    with pytest.raises(FormatError, match=message) as caught:
        Skeleton(open_source(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_config_without_names(checkpoint: Callable[..., Path]) -> None:
    """No architecture, no dtype: the causal model, in the dtype that most bytes have."""
    path = checkpoint("llama", torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    del config["architectures"], config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    skeleton = Skeleton(open_source(path))
    assert type(skeleton.model).__name__ == "LlamaForCausalLM" and skeleton.model.dtype == torch.bfloat16


def test_tensors_that_no_model_has_are_let_be(checkpoint: Callable[..., Path]) -> None:
    """Such as tables of rotary frequencies, or a second copy of a tied head."""
    path = checkpoint("qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(9)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(open_source(path))
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not [n for n in skeleton.parameters if "lm_head" in n or "inv_freq" in n]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value: float, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(open_source(path))
    message = "tensor model.layers.1.mlp.up_proj.weight holds NaN or infinite values"
    with pytest.raises(FormatError, match=message):
        skeleton.check_finite()
    with skeleton.loaded(skeleton.parameters_of(0)):
        pass
    with pytest.raises(FormatError, match=message):
        skeleton.load(skeleton.parameters_of(1))
