"""Compiling with the rotation folded in, end to end: what is stored, what it computes, and going on after a kill."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bitpalette
from bitpalette.api import compile_checkpoint, prepare_compilation
from bitpalette.calibrate.plan import Plan
from bitpalette.calibrate.report import Events
from bitpalette.calibrate.text import Calibration
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.native import open_native
from bitpalette.formats.verify import verify
from bitpalette.kernels.activation_form import ACTIVATIONS_VARIABLE
from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.norm import RotatedNorm
from bitpalette.quant.scheme import Scheme
from bitpalette.recipe import make_plan

FOLDED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "deepseek_v2")
TEXT = "The cat sat on the mat, and then it went for a walk in the rain; nobody knew why. " * 40


def rotated(bits: int, *, fold: bool = True, outer: int | None = None, solver: str = "rtn") -> Plan:
    scheme = Scheme.from_dict({"codec": "int", "bits": bits, "group_size": 24, "transforms": ["rotate"]})
    other = None if outer is None else Scheme.from_dict({"codec": "int", "bits": outer})
    return Plan(scheme, other, other, solver=solver, seed=3, fold=fold)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    (tmp_path / "text.txt").write_text(TEXT)
    return Calibration(str(tmp_path / "text.txt"), 256, 32, 0)


@pytest.mark.parametrize("outer", [None, 8])
@pytest.mark.parametrize("name", FOLDED)
def test_eight_bits_are_close_to_the_original(
    checkpoint: Callable[..., Path], families: Any, tmp_path: Path, name: str, outer: int | None, ids: torch.Tensor
) -> None:
    out = tmp_path / "out"
    notes: list[str] = []
    compile_checkpoint(str(checkpoint(name)), out, rotated(8, outer=outer), events=Events(note=notes.append))
    assert notes == []
    assert list(verify(out)) == []
    original = families[name]()
    model = bitpalette.load(out)
    tied = bool(original.config.tie_word_embeddings)
    assert isinstance(model.model.norm, RotatedNorm) == tied
    assert open_native(out).quantization.rotated_norms == (["model.norm.weight"] if tied else [])
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    online = {n.rpartition(".")[2] for n, m in modules.items() if m.scheme.transforms}
    assert {"q_proj", "qkv_proj", "q_a_proj", "gate_proj", "gate_up_proj", "lm_head"}.isdisjoint(online)
    assert "o_proj" in online
    # in a mixture with random routers, rounding may send a token to another expert
    mixture = name in ("mixtral", "qwen3_moe", "deepseek_v2")
    assert relative(logits(model, ids), logits(original, ids)) < (0.1 if mixture else 0.03)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("outer", [None, 8])
def test_dequantized_it_is_a_plain_model_of_its_own(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    name: str,
    outer: int | None,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "float32")  # as torch multiplies without the layers
    out, plain = tmp_path / "out", tmp_path / "plain"
    compile_checkpoint(str(checkpoint(name)), out, rotated(4, outer=outer))
    model = bitpalette.load(out)
    want = logits(model, ids)
    model = model.dequantize()
    assert not any(isinstance(m, RotatedNorm | QuantLinear) for m in model.modules())
    assert relative(logits(model, ids), want) < 1e-4
    model.save_pretrained(plain)
    again = type(model).from_pretrained(plain)
    assert relative(logits(again, ids), want) < 1e-4


def test_saving_copying_and_pickling_a_tied_model(
    checkpoint: Callable[..., Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    compile_checkpoint(str(checkpoint("qwen3", torch.bfloat16)), out, rotated(4, outer=8))
    model = bitpalette.load(out)
    want = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), want)
    model.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["rotated_norms"]
    other = type(model).from_pretrained(again)
    assert isinstance(other.model.norm, RotatedNorm)
    assert torch.equal(logits(other, ids), want)


def test_files_that_disagree_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_checkpoint(str(checkpoint("qwen2")), out, rotated(4))
    with pytest.raises(FormatError, match="start from the checkpoint that it was made from"):
        prepare_compilation(open_source(str(out)), tmp_path / "twice", Plan(None))
    config = json.loads((out / "config.json").read_text())
    for wrong, message in (
        (["model.norm.gain"], r"'model.norm.gain' \(a rotated norm\) is missing"),
        ({"model.norm.weight": 0}, "rotated_norms"),
        (["model.layers.0.self_attn.q_proj.weight"], "quantized tensor and a rotated norm"),
    ):
        config["quantization_config"]["rotated_norms"] = wrong
        (out / "config.json").write_text(json.dumps(config))
        problems = [str(p) for p in verify(out) if "cannot be opened" in str(p)]
        assert problems and re.search(message, problems[0]), problems


def test_not_folded_where_asked_or_impossible(
    checkpoint: Callable[..., Path], families: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    notes: list[str] = []
    for name, fold in (("llama", False), ("gemma2", True)):
        out = tmp_path / f"{name}-out"
        compile_checkpoint(str(checkpoint(name)), out, rotated(8, fold=fold), events=Events(note=notes.append))
        model = bitpalette.load(out)
        assert model.model.layers[0].self_attn.q_proj.scheme.transforms == ("rotate",)
        assert relative(logits(model, ids), logits(families[name](), ids)) < 0.03
    assert len(notes) == 1 and "a norm of what is added to the residual stream" in notes[0]
    scaled = prepare_compilation(
        str(checkpoint("llama")),
        tmp_path / "awq",
        rotated(4, solver="awq"),
        calibration=Calibration("builtin", 64, 32, 0),
    )
    assert "awq" in scaled.not_folded and scaled.skeleton.fold is None


def test_nothing_is_folded_where_no_reader_rotates(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plan = make_plan(
        bits=4, solver="rtn", rotate=True, keep=["*_proj", "lm_head", "embed_tokens"], group_size=24, fold=True
    )
    compilation = prepare_compilation(str(checkpoint("llama")), tmp_path / "out", plan)
    assert compilation.skeleton.fold is None and not compilation.not_folded
    plan = make_plan(bits=4, solver="rtn", rotate=True, keep=["q_proj", "lm_head"], group_size=24, fold=True)
    compilation = prepare_compilation(str(checkpoint("llama")), tmp_path / "out", plan)
    assert compilation.skeleton.fold is not None
    assert compilation.schemes["model.layers.0.self_attn.k_proj.weight"].transforms == ()
    assert compilation.schemes["model.layers.0.self_attn.o_proj.weight"].transforms == ("rotate",)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_killed_and_resumed_it_is_the_same_file(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, calibration: Calibration
) -> None:
    model = str(checkpoint(name, torch.bfloat16))
    plan = rotated(4, outer=8, solver="gptq")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    compilation = prepare_compilation(model, whole, plan, calibration=calibration)
    compilation.run()
    for name, size in compilation.sizes().files.items():
        assert (whole / name).stat().st_size == size

    class Killed(BaseException):
        pass

    def part(done: int, of: int) -> None:
        if done == stop:
            raise Killed

    for stop in (1, 2):
        with pytest.raises(Killed):
            compile_checkpoint(model, killed, plan, calibration=calibration, events=Events(part=part))
        stop += 1
    compile_checkpoint(model, killed, plan, calibration=calibration)
    assert digests(killed) == digests(whole)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_statistics_know_whether_they_are_of_the_folded_model(
    checkpoint: Callable[..., Path], tmp_path: Path, calibration: Calibration, ids: torch.Tensor, families: Any
) -> None:
    model, store = str(checkpoint("qwen2")), tmp_path / "stats"
    prepared = prepare_compilation(
        model, tmp_path / "a", rotated(8, solver="gptq"), calibration=calibration, stats=store
    )
    prepared.run()
    assert relative(logits(bitpalette.load(tmp_path / "a"), ids), logits(families["qwen2"](), ids)) < 0.03
    with pytest.raises(FormatError, match=r"fold.* differ"):
        prepare_compilation(
            model, tmp_path / "b", rotated(8, solver="gptq", fold=False), calibration=calibration, stats=store
        ).run()


def test_a_rotated_norm_that_the_model_lacks(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_checkpoint(str(checkpoint("qwen2")), out, rotated(4))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["rotated_norms"] = ["model.layers.0.self_attn.q_proj.bias"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"rotated norm .*q_proj.bias"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
