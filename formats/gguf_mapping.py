"""What a GGUF header means to transformers: its config, its model's parameters, and which tensor is which of them.

transformers knows all of it, but reads it through `GGUFReader`, which takes ten seconds over a vocabulary of 50 000,
and rebuilds gguf's name map once for every module of the model. Here it is given a stand-in file that holds the short
metadata and the tensor names only, and the name map is built once.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import FormatError
from .gguf_blocks import decode_rows
from .gguf_header import GgufHeader, GgufTensor
from .gguf_rope import rope_parameters

UNREAD = {
    "gpt2": {"context_length": "n_positions"},
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
"""{architecture: {key: config key}}: sizes that files state and transformers 5.23 leaves at one checkpoint's value."""


ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass
class GgufMapping:
    """config: for config.json; shapes: {parameter: shape}; parts: {parameter: its tensors in the file};
    processor, key_mapping: transformers' own, to undo what llama.cpp changed in the weights."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, list[GgufTensor]]
    processor: Any
    key_mapping: dict[str, str]


def map_header(header: GgufHeader) -> GgufMapping:
    """FormatError for an architecture, tensor or parameter without a counterpart, or a shape that disagrees."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    config = AutoConfig.for_model(**_config_values(header))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise FormatError(f"{header.path}: architecture {header.architecture!r} is no causal language model")
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    key_mapping = _key_mapping(header, model, processor)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    values = json.loads(config.to_json_string(use_diff=True))
    values.pop("_name_or_path", None)
    return GgufMapping(values, shapes, _assign(header, key_mapping, shapes), processor, key_mapping)


def _config_values(header: GgufHeader) -> dict[str, Any]:
    """The keyword arguments of the model's config class, model_type among them."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, load_gguf_checkpoint

    arch = header.architecture
    if arch in GGUF_CONFIG_ARCHS and arch in TENSOR_PROCESSORS:
        return dict(get_gguf_config(header.metadata, tuple(header.tensors)))
    with tempfile.TemporaryDirectory() as folder:
        stand_in = str(Path(folder) / "header.gguf")
        _write_stand_in(header, stand_in)
        try:
            values: dict[str, Any] = load_gguf_checkpoint(stand_in)["config"]
        except ValueError as error:
            raise FormatError(
                f"{header.path}: architecture {arch!r} cannot be mapped to transformers ({error}); use the safetensors "
                "checkpoint of this model"
            ) from error
    values.pop("_model_name_or_path", None)
    values.setdefault("vocab_size", _vocab_size(header))
    for key, name in UNREAD.get(arch, {}).items():
        if f"{arch}.{key}" in header.metadata:
            values[name] = header.metadata[f"{arch}.{key}"]
    if ROPE_FREQUENCIES in header.tensors:
        values["rope_parameters"] = _rope(header, values.pop("rope_theta", None))
    return values


def _rope(header: GgufHeader, theta: Any) -> dict[str, Any]:
    """The scaling that the tensor of frequency factors stands for, which transformers would leave out."""
    tensor = header.tensors[ROPE_FREQUENCIES]
    parameters = None
    if header.architecture == "llama" and len(tensor.shape) == 1 and isinstance(theta, float):
        parameters = rope_parameters(theta, torch.from_numpy(decode_rows(header.path, tensor, 0, 1)[0]))
    if parameters is None:
        raise FormatError(
            f"{header.path}: the rotary frequencies are scaled ({ROPE_FREQUENCIES}) in a way that cannot be mapped to "
            "transformers; use the safetensors checkpoint of this model"
        )
    return parameters


def _vocab_size(header: GgufHeader) -> Any:
    """As stated, or else the number of tokens, or else the rows of the embedding."""
    stated = header.metadata.get(f"{header.architecture}.vocab_size", header.metadata.get("tokenizer.ggml.tokens"))
    if stated is None and "token_embd.weight" in header.tensors:
        return header.tensors["token_embd.weight"].shape[0]
    return stated


def _write_stand_in(header: GgufHeader, path: str) -> None:
    """A GGUF file with the header's scalars, strings and short arrays, and one weight under every tensor's name."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, header.architecture)  # writes general.architecture itself
    metadata = dict(header.metadata)
    metadata[f"{header.architecture}.vocab_size"] = _vocab_size(header)  # the vocabulary itself is left out
    for key, value in metadata.items():
        if value is None or key in ("general.architecture", "general.alignment") or key in header.long_arrays:
            continue
        if isinstance(value, list):
            if value:
                writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.FLOAT64 if isinstance(value, float) else _integer(value))
    for name in header.tensors:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _integer(value: int) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.INT64 if value < 0 else GGUFValueType.UINT64


def _key_mapping(header: GgufHeader, model: torch.nn.Module, processor: Any) -> dict[str, str]:
    """{GGUF tensor name: parameter}. Some maps know names without the base model's prefix, so those are tried last."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = header.architecture.replace("gpt_oss", "gpt-oss")
    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch]
    if not kinds:
        raise FormatError(f"{header.path}: architecture {arch!r} is unknown to this gguf package; upgrade it")
    name_map = get_tensor_name_map(kinds[0], header.metadata[f"{header.architecture}.block_count"])
    names = list(model.state_dict())
    mapping: dict[str, str] = {}
    for depth in range(max(name.count(".") for name in names) + 1):
        deeper: dict[str, str] = {}
        for full in names:
            parts = full.split(".")
            if len(parts) <= depth:
                continue
            prefix, name = "".join(f"{part}." for part in parts[:depth]), ".".join(parts[depth:])
            name = processor.preprocess_name(name)
            stem, dot, suffix = name.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = name, "", ""
            found = name_map.get_name(stem)
            if found is None:
                processor.perform_fallback_tensor_mapping(deeper, dot + suffix, prefix, name)
            else:
                deeper[found + dot + suffix] = prefix + name
        mapping = deeper | mapping
    if header.architecture == "gpt2":
        mapping["output.weight"] = "lm_head.weight"  # its processor stores the head under this name by itself
    return mapping


def _assign(
    header: GgufHeader, key_mapping: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[GgufTensor]]:
    parts: dict[str, list[GgufTensor]] = {name: [] for name in shapes}
    for t in header.tensors.values():
        if t.name == ROPE_FREQUENCIES:
            continue  # in the config
        # stacked experts have no suffix on transformers' side
        target = key_mapping.get(t.name) or key_mapping.get(t.name.removesuffix(".weight"))
        if target is None:
            raise FormatError(
                f"{header.path}: tensor {t.name!r} of architecture {header.architecture!r} has no counterpart in "
                "transformers; use the safetensors checkpoint of this model"
            )
        if target in parts:  # not: a copy of a tied weight
            parts[target].append(t)
    for name, shape in shapes.items():
        if not parts[name]:
            raise FormatError(f"{header.path}: holds nothing for {name!r}; use another file")
        have = sum(math.prod(t.shape) for t in parts[name])
        if have != math.prod(shape):
            raise FormatError(
                f"{header.path}: tensor {parts[name][0].name!r} has {have} weights, its metadata needs {list(shape)} "
                f"for {name!r}; use another file"
            )
    return parts
