"""Which parameters of a model are weights, and which modules repeat, on the tiny models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitpalette.calibrate.structure import decoder_blocks, owner, quantizable, skipped

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
}
KINDS = {"gpt2": {"conv1d", "embedding"}}
MOE = {"mixtral", "qwen3_moe", "deepseek_v2"}


def test_every_matrix_is_a_weight_or_has_a_reason(families: Any, family: str) -> None:
    model = families[family]()
    weights, rest = quantizable(model), skipped(model)
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert set(weights) | set(rest) == matrices
    assert not set(weights) & set(rest)
    for reason in rest.values():
        assert reason in ("a router",) or "positions" in reason
    kinds = {w.kind for w in weights.values()}
    assert kinds == KINDS.get(family, {"linear", "embedding"} | ({"experts"} if family in MOE else set()))


def test_shapes_names_and_flags(families: Any, family: str) -> None:
    model = families[family]()
    parameters = dict(model.named_parameters())
    weights = quantizable(model)
    for name, weight in weights.items():
        shape = tuple(parameters[name].shape)
        assert weight.shape == (shape[::-1] if weight.kind == "conv1d" else shape)
        assert name.startswith(weight.module_name + ".")
        found = owner(model, name)
        assert found is not None and found == (model.get_submodule(weight.module_name), weight.kind)
    embeddings = [n for n, w in weights.items() if w.embedding]
    heads = [n for n, w in weights.items() if w.head]
    assert len(embeddings) == 1 and len(heads) == 1
    assert parameters[embeddings[0]] is model.get_input_embeddings().weight
    assert parameters[heads[0]] is model.get_output_embeddings().weight
    assert (embeddings == heads) == bool(model.config.tie_word_embeddings)


def test_the_same_on_a_meta_skeleton(families: Any, family: str) -> None:
    model = families[family]()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert quantizable(skeleton) == quantizable(model)


def test_decoder_blocks(families: Any, family: str) -> None:
    model = families[family]()
    blocks = decoder_blocks(model)
    prefix = BLOCKS.get(family, "model.layers")
    assert [name for name, _ in blocks] == [f"{prefix}.0", f"{prefix}.1"]
    assert blocks[1][1] is model.get_submodule(f"{prefix}.1")


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(3, 4)))


class Block(nn.Module):
    """A mixture whose router is an nn.Linear, as many remote-code models have."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 6, bias=False)
        self.shared_expert_gate = nn.Linear(12, 1, bias=False)
        self.up = nn.Linear(12, 24)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(6, 16, 12))
        self.experts.down_proj = nn.Parameter(torch.zeros(6, 12, 8))


def test_linear_routers_are_flagged() -> None:
    weights = quantizable(nn.ModuleList([Block()]))
    assert {n for n, w in weights.items() if w.router} == {"0.router.weight", "0.shared_expert_gate.weight"}
    assert weights["0.experts.gate_up_proj"].shape == (6, 16, 12)


def test_unknown_layouts_are_named_not_dropped() -> None:
    block = Block()
    block.experts.gate_up_proj = nn.Parameter(torch.zeros(6, 12, 16))  # transposed, as in gpt-oss
    block.experts.down_proj = nn.Parameter(torch.zeros(6, 8, 12))
    block.attention = nn.MultiheadAttention(12, 2)
    weights, rest = quantizable(block), skipped(block)
    assert not any(w.kind == "experts" for w in weights.values())
    assert {"experts.gate_up_proj", "experts.down_proj", "attention.out_proj.weight"} <= set(rest)
    assert owner(block, "experts.down_proj") is None
    with pytest.raises(KeyError, match="nothing"):
        owner(block, "nothing.weight")
