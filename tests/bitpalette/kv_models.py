"""Tiny models for the tests of the packed cache, with random weights so large that tokens depend on the context, and
ways to run them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.quant.kv_format import KVFormat

EXACT = KVFormat(16, 16, 4, 8)
SMALL = KVFormat(3, 2, 4, 8)
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
TURNS = ["sliding_attention", "full_attention"]


def build(model_class: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.15)
    return model.requires_grad_(False)


def llama(layers: int = 2, seed: int = 0, **sizes: Any) -> Any:
    config = transformers.LlamaConfig(**(SIZES | sizes), num_hidden_layers=layers)
    return build(transformers.LlamaForCausalLM, config, seed)


def packed_llama() -> Any:
    """Two layers that read packed caches."""
    model = llama()
    model.set_attn_implementation(NAME)
    return model


def hybrid(name: str) -> Any:
    """A model of several kinds of layers."""
    per_layer = {"vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 8}
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TURNS * 2, "sliding_window": 9}
    windows = {"num_hidden_layers": 2, "sliding_window": 9, "layer_types": TURNS}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    options: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", windows),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", windows),
        "gemma3n": (
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            per_layer | shared | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2},
        ),
        "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", per_layer | shared | {"global_head_dim": 24}),
        "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", windows | experts),
        "llama4": (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            {"num_hidden_layers": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 96}
            | experts
            | {"layer_types": ["chunked_attention", "full_attention"]},
        ),
        "mimo_v2": (  # keys and values of different width, other sizes in layers with a window
            "MiMoV2FlashForCausalLM",
            "MiMoV2FlashConfig",
            windows
            | {"head_dim": 24, "v_head_dim": 16, "swa_num_key_value_heads": 2, "swa_num_attention_heads": 4}
            | {"swa_head_dim": 24, "swa_v_head_dim": 16, "mlp_layer_types": ["dense"] * 2},
        ),
        "mistral": ("MistralForCausalLM", "MistralConfig", {"num_hidden_layers": 2, "sliding_window": None}),
        "qwen3_next": (
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
            | {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
            | {"linear_value_head_dim": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        ),
    }
    model_class, config_class, values = options[name]
    return build(getattr(transformers, model_class), getattr(transformers, config_class)(**(SIZES | values)))


HYBRIDS = ["gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss", "llama4", "mimo_v2", "mistral", "qwen3_next"]


def ids(n: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (rows, n), generator=torch.Generator().manual_seed(seed))


def padded(n: int, padding: int) -> dict[str, Tensor]:
    """Two rows, the second with `padding` on the left."""
    tokens, mask = ids(n), torch.ones(2, n, dtype=torch.int64)
    tokens[1, :padding], mask[1, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def check_generates(model: Any, inputs: dict[str, Tensor], form: KVFormat = EXACT, **options: Any) -> None:
    """The same tokens as with transformers' own attention and cache, from the same logits but for their last bits: a
    tiny model may repeat one token whatever it sees. static: most tokens of a cache of fixed size."""
    static = options.pop("static", 0)
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True} | options
    dense = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    cache = QuantizedCache(model.config, form, static, static=static > 0)
    packed = model.generate(**inputs, past_key_values=cache, **options)
    model.set_attn_implementation(before)
    assert torch.equal(dense.sequences, packed.sequences)
    right, found = torch.stack(dense.logits), torch.stack(packed.logits)
    assert ((found - right).abs() <= 1e-3 * right.std()).all()


def logits(model: Any, cache: Any, tokens: Tensor, step: int, mask: Tensor | None = None) -> Tensor:
    """Through the cache, `step` tokens a forward: float32 [rows, n, vocabulary]."""
    out, past = [], int(cache.get_seq_length())
    with torch.no_grad():
        for first in range(0, tokens.shape[1], step):
            part = tokens[:, first : first + step]
            seen = None if mask is None else mask[:, : past + first + part.shape[1]]
            positions = None if seen is None else (seen.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            found = model(input_ids=part, past_key_values=cache, attention_mask=seen, position_ids=positions)
            out.append(found.logits)
    return torch.cat(out, 1)
