"""A rotation folded into the weights changes nothing, on every family that it can be folded into."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.calibrate.fold import Fold, find_fold, rotate_axis
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.residual import Reader
from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.formats.base import open_source
from bitpalette.quant.rotate import TRANSFORM, random_signs

FOLDED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "deepseek_v2")
REASONS = {
    "gemma2": "layers.0.post_attention_layernorm is a norm of what is added to the residual stream",
    "gemma3": "layers.0.post_attention_layernorm is a norm of what is added to the residual stream",
    "opt": "embed_positions.weight stands outside the blocks",
    "gpt2": "wpe.weight stands outside the blocks",
    "gpt_neox": r"final_layer_norm \(LayerNorm\) has a bias",
    "falcon": r"ln_f \(LayerNorm\) has a bias",
    "bert": "position_embeddings.weight stands outside the blocks",
}


def fold_of(skeleton: Skeleton, seed: int = 5) -> Fold:
    fold = find_fold(skeleton, seed)
    assert isinstance(fold, Fold), fold
    return fold


def loaded(skeleton: Skeleton, *, fold: Fold | None = None) -> Any:
    """The whole model of a skeleton, folded or not."""
    if fold is not None:
        skeleton.fold_in(fold)
    for part in [*range(len(skeleton.blocks)), None]:
        skeleton.load(skeleton.parameters_of(part))
    skeleton.model.tie_weights()
    return skeleton.model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_every_family_folds_or_says_why(checkpoint: Callable[..., Path], family: str) -> None:
    found = find_fold(Skeleton(open_source(str(checkpoint(family)))), 0)
    if family in FOLDED:
        assert isinstance(found, Fold), found
    else:
        assert isinstance(found, str) and "\n" not in found
        assert re.search(REASONS[family], found), found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_is_the_same_model(families: Any, tmp_path: Path, name: str, tied: bool, ids: torch.Tensor) -> None:
    model = families[name]()
    model.config.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    elif model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.08)
    model.save_pretrained(tmp_path)
    want = logits(model, ids)
    skeleton = Skeleton(open_source(str(tmp_path)))
    fold = fold_of(skeleton)
    assert (fold.rotated_norm == "model.norm.weight") == tied
    folded = loaded(skeleton, fold=fold)
    assert relative(logits(folded, ids), want) < 1e-4
    original = dict(model.named_parameters())
    gains = [n for n, p in skeleton.model.named_parameters() if n in fold.residual.gains]
    assert len(gains) == 5
    for gain in gains:
        if gain == fold.rotated_norm:
            assert torch.equal(skeleton.get(gain), original[gain])
        else:
            assert bool((skeleton.get(gain) == 1).all())
    changed = {*fold.residual.readers, *fold.residual.writers}
    for weight, value in original.items():
        same = torch.equal(skeleton.get(weight), value)
        assert same == (weight not in changed and weight not in set(gains) - {fold.rotated_norm}), weight
    table = original[fold.residual.embedding]
    assert torch.allclose(
        skeleton.get(fold.residual.embedding), TRANSFORM.apply_weight(table, {"signs": fold.signs}), atol=1e-6
    )


def test_biases_of_writers_are_rotated(families: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    import transformers

    values = families["llama"]().config.to_dict() | {"attention_bias": True, "mlp_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(open_source(str(tmp_path)))
    fold = fold_of(skeleton)
    assert fold.residual.writers["model.layers.1.mlp.down_proj.bias"] == -1
    assert "model.layers.1.mlp.up_proj.bias" not in fold.residual.writers
    assert relative(logits(loaded(skeleton, fold=fold), ids), logits(model, ids)) < 1e-4


def test_gains_that_are_one_plus_the_weight(tmp_path: Path, ids: torch.Tensor, families: Any) -> None:
    import transformers

    values = families["llama"]().config.to_dict() | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    for tied in (True, False):
        config = transformers.GemmaConfig(**{**values, "tie_word_embeddings": tied})
        model = transformers.GemmaForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        path = tmp_path / str(tied)
        model.save_pretrained(path)
        skeleton = Skeleton(open_source(str(path)))
        fold = fold_of(skeleton)
        assert set(fold.residual.gains.values()) == {0.0}
        assert relative(logits(loaded(skeleton, fold=fold), ids), logits(model, ids)) < 1e-4
        assert not bool(skeleton.get("model.layers.0.input_layernorm.weight").any())


def test_bfloat16_parts_keep_their_dtype(checkpoint: Callable[..., Path], ids: torch.Tensor) -> None:
    path = checkpoint("qwen3", torch.bfloat16)
    want = logits(loaded(Skeleton(open_source(str(path)))), ids)
    skeleton = Skeleton(open_source(str(path)))
    folded = loaded(skeleton, fold=fold_of(skeleton))
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert relative(logits(folded, ids), want) < 0.05


BREAKS: dict[str, Callable[[Any], None]] = {
    "a writer left out": lambda r: r.writers.pop("model.layers.1.mlp.experts.down_proj"),
    "a reader left out": lambda r: r.readers.pop("model.layers.1.self_attn.k_proj.weight"),
    "a reader of the other norm": lambda r: r.readers.update(
        {"model.layers.1.mlp.gate.weight": Reader("model.layers.1.input_layernorm.weight", -1)}
    ),
    "a gain that stays": lambda r: r.gains.update({"model.layers.1.input_layernorm.weight": 2.0}),
    "a weight that is none": lambda r: r.writers.update({"model.layers.1.self_attn.v_proj.weight": -1}),
}


@pytest.mark.parametrize("broken", list(BREAKS))
def test_a_wrong_fold_is_caught(checkpoint: Callable[..., Path], broken: str) -> None:
    skeleton = Skeleton(open_source(str(checkpoint("qwen3_moe"))))
    fold = fold_of(skeleton)
    BREAKS[broken](fold.residual)
    skeleton.fold_in(fold)
    skeleton.load(skeleton.parameters_of(0))
    with pytest.raises(PlanError, match=r"model\.layers\.1: .*--no-fold"):
        skeleton.load(skeleton.parameters_of(1))


HEAD_BREAKS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "the head left out": ("llama", lambda r: r.readers.pop(r.head)),
    "the final gain stays": ("llama", lambda r: r.gains.update({r.final_gain: 2.0})),
    "the embeddings left out": ("qwen2", lambda r: r.writers.pop(r.embedding)),
    "the norm is not told to rotate": ("qwen2", lambda r: None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", list(HEAD_BREAKS))
def test_a_wrong_fold_of_the_head_is_caught(checkpoint: Callable[..., Path], broken: str, dtype: torch.dtype) -> None:
    name, change = HEAD_BREAKS[broken]
    skeleton = Skeleton(open_source(str(checkpoint(name, dtype))))
    skeleton.fold = fold_of(skeleton)  # without `install`
    change(skeleton.fold.residual)
    with pytest.raises(PlanError, match=r"the head .*--no-fold"):
        skeleton.load(skeleton.parameters_of(None))


def test_rotate_axis() -> None:
    signs = random_signs(3, 20)
    matrix = TRANSFORM.apply_input(torch.eye(20), {"signs": signs}).T  # T as a matrix
    gain = torch.rand(20) + 0.5
    reader, writer, conv1d = torch.randn(7, 20), torch.randn(20, 7), torch.randn(20, 7)
    assert torch.allclose(rotate_axis(reader, -1, signs, gain), reader * gain @ matrix.T, atol=1e-5)
    assert torch.allclose(rotate_axis(writer, -2, signs), matrix @ writer, atol=1e-5)
    assert torch.allclose(rotate_axis(conv1d, -2, signs, gain), (conv1d.T * gain @ matrix.T).T, atol=1e-5)
    assert torch.allclose(rotate_axis(writer[:, 0], -1, signs), matrix @ writer[:, 0], atol=1e-5)
    experts = torch.randn(3, 20, 7)
    assert torch.allclose(rotate_axis(experts, -2, signs), matrix @ experts, atol=1e-5)
