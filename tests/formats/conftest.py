"""Tiny checkpoints, made in tmp_path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitpalette.formats.manifest import write_manifest
from bitpalette.formats.native import NativeConfig, build_entries, stored_fields
from bitpalette.formats.shards import ShardWriter, plan_shards
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, stack


def quantize(w: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Nearest rounding; experts one by one."""
    if w.ndim == 3:
        return stack([quantize(part, scheme) for part in w])
    return quantize_tensor(w, scheme)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model.embed_tokens.weight": torch.randn(17, 24, generator=generator).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(24, 24, generator=generator).bfloat16(),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 10, 24, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(24).bfloat16(),
    }


@pytest.fixture
def plain(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """An unquantized directory with one safetensors file, a tokenizer and things that must stay behind."""
    path = tmp_path / "plain"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    (path / "tokenizer.json").write_text('{"tokens": 1}')
    (path / "generation_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("card")
    (path / "pytorch_model.bin").write_bytes(b"0")
    (path / ".gitattributes").write_text("")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def make_native(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """make_native(scheme, max_shard_bytes=..., manifest=True): a native directory, two tensors of it quantized."""

    def make(scheme: Scheme | None = None, *, max_shard_bytes: int = 10**9, manifest: bool = True) -> Path:
        path = tmp_path / "native"
        scheme = scheme or Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 16})
        quantized = {n: quantize(w.float(), scheme) for n, w in weights.items() if "proj" in n}
        config = NativeConfig.build(
            {name: (qt.scheme, qt.shape) for name, qt in quantized.items()}, bitpalette_version="0.1", seed=3
        )
        plan = plan_shards(build_entries([(n, w.shape, w.dtype) for n, w in weights.items()], config), max_shard_bytes)
        with ShardWriter(path, plan) as writer:
            for name, w in weights.items():
                fields = stored_fields(name, quantized[name]) if name in quantized else {name: w}
                for stored, tensor in fields.items():
                    writer.write(stored, tensor)
            writer.finish()
        values = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": config.to_dict()}
        (path / "config.json").write_text(json.dumps(values))
        (path / "tokenizer.json").write_text("{}")
        if manifest:
            write_manifest(path)
        return path

    return make
