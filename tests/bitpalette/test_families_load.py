"""Every family: a packed checkpoint written by hand loads into packed modules and computes what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import bitpalette.hf  # noqa: F401  (registers with transformers)
from bitpalette.calibrate.structure import quantizable
from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.kernels.experts import QuantExperts
from bitpalette.kernels.linear import QuantLinear

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"linear": QuantLinear, "conv1d": QuantLinear, "embedding": QuantEmbedding, "experts": QuantExperts}


def load(path: Path, **kwargs: Any) -> Any:
    auto = AutoModelForMaskedLM if path.name.startswith("bert") else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (got - want).norm() / want.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have tolerances of their own; here the question is whether the right numbers are in the right place."""
    monkeypatch.setenv("BITPALETTE_KERNEL", "reference")


def test_loads_into_packed_modules(packed: Callable[..., Any], family: str, ids: torch.Tensor) -> None:
    made = packed(family)
    weights = quantizable(made.reference)
    model = load(made.path)
    assert len(made.tensors) == len([w for w in weights.values() if not w.router])
    for name in made.tensors:
        module = model.get_submodule(weights[name].module_name)
        assert type(module) is CLASSES[weights[name].kind], name
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert_same(logits(model, ids), logits(made.reference, ids))


def test_without_embeddings_and_heads(packed: Callable[..., Any], family: str, ids: torch.Tensor) -> None:
    made = packed(family, lambda n, w: None if w.embedding or w.head else {"codec": "int", "bits": 5, "group_size": 24})
    model = load(made.path)
    assert not isinstance(model.get_input_embeddings(), QuantEmbedding)
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(logits(model, ids), logits(made.reference, ids))


def test_saved_again_is_the_same_file(
    packed: Callable[..., Any], family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    made = packed(family)
    model = load(made.path)
    again = tmp_path / made.path.name / "again"
    logits(model, ids)  # kernels are prepared by now
    model.save_pretrained(again)
    stored = load_file(again / "model.safetensors")
    assert stored.keys() == made.stored.keys()
    for name, tensor in made.stored.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    second = again.rename(again.parent / made.path.name)
    assert torch.equal(logits(load(second), ids), logits(model, ids))


def test_dequantize_gives_the_architecture_back(
    packed: Callable[..., Any], family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    made = packed(family)
    model = load(made.path).dequantize()
    assert model.all_tied_weights_keys == made.reference.all_tied_weights_keys
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in made.reference.named_parameters()]
    for (name, a), b in zip(model.named_parameters(), made.reference.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert_same(logits(model, ids), logits(made.reference, ids))
    plain = tmp_path / f"{family}-plain"
    model.save_pretrained(plain)
    assert_same(logits(load(plain), ids), logits(made.reference, ids))


def test_sixteen_bit_activations(packed: Callable[..., Any], family: str, ids: torch.Tensor) -> None:
    made = packed(family, dtype=torch.bfloat16)
    model = load(made.path, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name in made.stored:
            assert buffer.dtype == made.stored[name].dtype, name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # in a mixture with random routers, rounding sends a few tokens to another expert
    mixture = any(w.kind == "experts" for w in quantizable(made.reference).values())
    assert_same(logits(model, ids), logits(made.reference.float(), ids), 0.2 if mixture else 0.05)


PLAIN = """
import pathlib, sys
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
transformers.logging.set_verbosity_error()
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for auto in (AutoModel, AutoModelForMaskedLM if path.name.startswith("bert") else AutoModelForCausalLM):
        try:
            auto.from_pretrained(path)
        except RuntimeError:
            print("raised", path.name, auto.__name__)
        else:
            print("LOADED", path.name, auto.__name__)
assert not any(name.startswith("bitpalette") for name in sys.modules)
"""

ONLY: dict[str, Callable[[str, Any], dict[str, Any] | None]] = {
    "experts": lambda n, w: {"codec": "int", "bits": 4, "group_size": 16} if w.kind == "experts" else None,
    "embedding": lambda n, w: {"codec": "int", "bits": 8} if w.embedding else None,
    "one": lambda n, w: {"codec": "int", "bits": 8} if ".1." in n and n.endswith("down_proj.weight") else None,
    "conv1d": lambda n, w: {"codec": "int", "bits": 2} if w.kind == "conv1d" and "c_fc" in n else None,
}


def test_without_the_package_loading_fails(packed: Callable[..., Any], families: Any, tmp_path: Path) -> None:
    """In a process of its own that never sees bitpalette, from a directory where it cannot be found by accident."""
    written = 0
    target = tmp_path / "all"
    target.mkdir()
    for name in families:
        packed(name).path.rename(target / f"{name}-all")
        written += 1
        for which, scheme_of in ONLY.items():
            made = packed(name, scheme_of)
            if made.tensors:
                made.path.rename(target / f"{name}-{which}")
                written += 1
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(target)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("LOADED")]
    assert len([line for line in lines if line.startswith("raised")]) == 2 * written > 60
