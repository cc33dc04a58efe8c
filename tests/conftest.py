"""Tiny models of every family, with random weights and sizes that divide badly, and a tokenizer built in code.

`FAMILIES[name]()` is the model in float32 with a fixed seed; the fixture `checkpoint` writes one as transformers does.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: before torch makes its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

VOCAB = 203
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _build(model_class: str, config_class: str, **values: Any) -> Any:
    import transformers

    torch.manual_seed(1234)
    config = getattr(transformers, config_class)(**values)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.08)
    return model


def llama() -> Any:
    return _build("LlamaForCausalLM", "LlamaConfig", **DENSE)


def mistral() -> Any:
    return _build("MistralForCausalLM", "MistralConfig", **DENSE, sliding_window=16)


def qwen2() -> Any:
    return _build("Qwen2ForCausalLM", "Qwen2Config", **DENSE, tie_word_embeddings=True)  # biases on q, k, v


def qwen3() -> Any:
    return _build("Qwen3ForCausalLM", "Qwen3Config", **DENSE, tie_word_embeddings=True)


def gemma2() -> Any:
    return _build("Gemma2ForCausalLM", "Gemma2Config", **DENSE, sliding_window=16)


def gemma3() -> Any:
    return _build("Gemma3ForCausalLM", "Gemma3TextConfig", **DENSE, sliding_window=16, query_pre_attn_scalar=18)


def phi3() -> Any:
    values = {k: v for k, v in DENSE.items() if k != "head_dim"}
    return _build("Phi3ForCausalLM", "Phi3Config", **values)  # fused qkv and gate_up


def opt() -> Any:
    return _build(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=72,
        ffn_dim=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=72,
        **TOKENS,
    )


def gpt2() -> Any:
    return _build(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCAB,
        n_embd=72,
        n_inner=100,
        n_layer=2,
        n_head=4,
        n_positions=128,
        **TOKENS,
    )


def gpt_neox() -> Any:
    values = {k: v for k, v in DENSE.items() if k not in ("head_dim", "num_key_value_heads")}
    return _build("GPTNeoXForCausalLM", "GPTNeoXConfig", **values, rotary_pct=0.25)


def falcon() -> Any:
    return _build(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=VOCAB,
        hidden_size=72,
        ffn_hidden_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        bias=True,
        **TOKENS,
    )


def mixtral() -> Any:
    return _build("MixtralForCausalLM", "MixtralConfig", **DENSE, num_local_experts=4, num_experts_per_tok=2)


def qwen3_moe() -> Any:
    return _build(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **DENSE,
        moe_intermediate_size=44,
        num_experts=5,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )


def deepseek_v2() -> Any:
    values = {k: v for k, v in DENSE.items() if k not in ("head_dim", "num_key_value_heads")}
    return _build(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        **values,
        num_key_value_heads=4,
        q_lora_rank=36,
        kv_lora_rank=28,
        qk_rope_head_dim=8,
        qk_nope_head_dim=14,
        v_head_dim=18,
        moe_intermediate_size=44,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="greedy",
    )


def bert() -> Any:
    values = {k: v for k, v in DENSE.items() if k not in ("head_dim", "num_key_value_heads")}
    return _build("BertForMaskedLM", "BertConfig", **values)


FAMILY_FUNCTIONS: tuple[Callable[[], Any], ...] = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma2,
    gemma3,
    phi3,
    opt,
    gpt2,
    gpt_neox,
    falcon,
    mixtral,
    qwen3_moe,
    deepseek_v2,
    bert,
)
FAMILIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in FAMILY_FUNCTIONS}


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges: any text has tokens, and they are fewer than VOCAB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # 256 bytes do not fit in VOCAB: bytes 0x80 and above share <unk>
    words = ["<pad>", "<s>", "</s>", "<unk>", *[c for c in alphabet if c.isascii()], "Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def token_ids(rows: int = 2, length: int = 19, seed: int = 7) -> torch.Tensor:
    """int64 [rows, length], none of the special tokens."""
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def families() -> dict[str, Callable[[], Any]]:
    """{family: function that builds its tiny model}; see FAMILIES."""
    return FAMILIES


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """One family's name after another."""
    return request.param


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(family, dtype=torch.float32) -> directory with model, configuration and tokenizer."""

    def write(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
        path = tmp_path / f"{name}-{str(dtype).removeprefix('torch.')}"
        FAMILIES[name]().to(dtype).save_pretrained(path, **kwargs)
        tiny_tokenizer().save_pretrained(path)
        return path

    return write


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 [2, 19] token ids: longer than the sliding windows."""
    return token_ids()


@dataclass
class Packed:
    """A packed checkpoint written by hand, and what it must compute."""

    path: Path
    reference: Any  # the float model with the dequantized weights put back
    tensors: dict[str, Any]  # {parameter name: QuantizedTensor}
    stored: dict[str, torch.Tensor]  # what model.safetensors holds


SchemeOf = Callable[[str, Any], "dict[str, Any] | None"]


def int4_everywhere(name: str, weight: Any) -> dict[str, Any] | None:
    """Groups of 16 and 32, symmetric or not, 8 bits for embeddings and heads; routers keep their dtype."""
    if weight.router:
        return None
    if weight.embedding or weight.head:
        return {"codec": "int", "bits": 8, "group_size": 0}
    if "down" in name or "o_proj" in name:
        return {"codec": "int", "bits": 4, "group_size": 16, "symmetric": False}
    return {"codec": "int", "bits": 4, "group_size": 16 if weight.shape[-1] < 32 else 32}


def pack(model: Any, path: Path, scheme_of: SchemeOf = int4_everywhere) -> Packed:
    """Write `model` as a packed checkpoint, field by field as the format says, without the product's own writer."""
    from safetensors.torch import save_file

    from bitpalette.calibrate.structure import quantizable
    from bitpalette.quant.scheme import Scheme
    from bitpalette.quant.solver import quantize_tensor
    from bitpalette.quant.tensor import stack

    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    stored = {k: v for k, v in model.state_dict().items() if k in parameters or v.data_ptr() not in _pointers(model)}
    schemes: list[dict[str, Any]] = []
    entries, tensors = {}, {}
    for name, weight in quantizable(model).items():
        values = scheme_of(name, weight)
        if values is None:
            continue
        scheme = Scheme.from_dict(values)
        w = parameters[name].detach()
        if weight.kind == "experts":
            qt = stack([quantize_tensor(part, scheme) for part in w])
        else:
            qt = quantize_tensor(w.T.contiguous() if weight.kind == "conv1d" else w, scheme)
        if values not in schemes:
            schemes.append(values)
        entries[name] = {"scheme": schemes.index(values), "shape": list(qt.shape)}
        tensors[name] = qt
        del stored[name]
        stored.update({name if field == "codes" else f"{name}_{field}": t for field, t in qt.fields.items()})
        dense = qt.dequantize()
        reference.get_parameter(name).data.copy_(dense.T if weight.kind == "conv1d" else dense)
    path.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")  # else transformers takes that of the fp16 scales
    config["quantization_config"] = {
        "quant_method": "bitpalette",
        "format_version": 1,
        "bitpalette_version": "0.0.0",
        "schemes": schemes,
        "tensors": entries,
        "seed": 0,
    }
    (path / "config.json").write_text(json.dumps(config))
    if model.can_generate():
        model.generation_config.save_pretrained(path)
    stored = {k: v.detach().clone().contiguous() for k, v in stored.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return Packed(path, reference, tensors, stored)


def _pointers(model: Any) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


def _module(name: str, path: Path) -> Any:
    """A file of the tests as a module: pytest imports them by path, so that none can import another by name."""
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pretended() -> Any:
    """tests/quant/pretend_gpu.py: PretendGpu, GpuTensor, DEVICE."""
    return _module("pretend_gpu", Path(__file__).parent / "quant" / "pretend_gpu.py")


@pytest.fixture(scope="session")
def hostexec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host executor, which runs CUDA kernels without a GPU: tests/hostexec/driver.py, Executor."""
    driver = _module("hostexec_driver", Path(__file__).parent / "hostexec" / "driver.py")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no g++")
    built = os.environ.get("HOSTEXEC_CACHE")  # a folder that outlives the session
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # what one process has built, all use
    return driver.Executor(Path(built) if built else shared / "hostexec")


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Packed]:
    """packed(family, scheme_of=int4_everywhere, dtype=torch.float32) -> Packed: a checkpoint written by hand."""

    def write(name: str, scheme_of: SchemeOf = int4_everywhere, dtype: torch.dtype = torch.float32) -> Packed:
        return pack(FAMILIES[name]().to(dtype), tmp_path / f"{name}-packed", scheme_of)

    return write
