"""Loading packed checkpoints through transformers: ties, devices, copies, saving, and what is refused."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaForCausalLM

import bitpalette.hf as hf
from bitpalette.formats.native import NativeConfig
from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.kernels.experts import QuantExperts
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import stack

Packed = Callable[..., Any]


def load(path: Path, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not info["missing_keys"], info
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 0.02) -> None:
    error = (got - want).norm() / want.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


# -- what a loaded model can do


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_with_the_kernels_a_user_would_run(packed: Packed, family: str, ids: torch.Tensor) -> None:
    made = packed(family)
    model = load(made.path)
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantExperts)) and getattr(module, "tied_to", None) is None:
            assert module.kernel_names, "not prepared when it was loaded"
    assert_close(logits(model, ids), logits(made.reference, ids), 0.1 if family == "mixtral" else 0.05)
    out = model.generate(ids[:1, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 8)


def test_the_bias_comes_along(packed: Packed) -> None:
    made = packed("qwen2")
    layer = load(made.path).model.layers[1].self_attn
    assert torch.equal(layer.q_proj.bias, made.reference.model.layers[1].self_attn.q_proj.bias)
    assert layer.o_proj.bias is None


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe"])
def test_deepcopy_pickle_and_torch_save(packed: Packed, family: str, ids: torch.Tensor) -> None:
    model = load(packed(family).path)
    want = logits(model, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(again, ids), want)
        head, table = again.get_output_embeddings(), again.get_input_embeddings()
        if again.config.tie_word_embeddings:
            assert head.tied_to is table and table is not model.get_input_embeddings()


def test_state_dict_is_the_file_and_loads_back(packed: Packed, ids: torch.Tensor) -> None:
    made = packed("qwen2")
    model = load(made.path)
    want = logits(model, ids)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert state.keys() == made.stored.keys()
    other = load(made.path)
    for module in other.modules():
        if isinstance(module, QuantLinear) and module.tied_to is None:
            module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()})
    assert not torch.allclose(logits(other, ids), want)
    other.load_state_dict(state)
    assert torch.equal(logits(other, ids), want)


def test_to_moves_and_never_casts_a_field(packed: Packed, ids: torch.Tensor) -> None:
    made = packed("qwen2")
    model = load(made.path).to(torch.bfloat16)
    state = model.state_dict()
    for name, tensor in made.stored.items():
        packed_field = any(name == p or name.startswith(p + "_") for p in made.tensors)
        assert state[name].dtype == (tensor.dtype if packed_field else torch.bfloat16), name
    assert model(ids).logits.dtype == torch.bfloat16
    meta = copy.deepcopy(model).to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_device_maps(packed: Packed, family: str, device_map: Any, ids: torch.Tensor) -> None:
    made = packed(family)
    assert torch.equal(logits(load(made.path, device_map=device_map), ids), logits(load(made.path), ids))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_layers_on_disk(packed: Packed, family: str, offload_buffers: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    made = packed(family)
    device_map = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk" if family == "qwen2" else "cpu"}
    offload = {"offload_folder": tmp_path / "offload", "offload_buffers": offload_buffers}
    model = load(made.path, device_map=device_map, **offload)
    on_disk = model.model.layers[1].self_attn.q_proj.state_dict()["weight"].device.type == "meta"
    assert on_disk == offload_buffers
    assert_close(logits(model, ids), logits(made.reference, ids), 0.1)
    again = tmp_path / "again"
    model.save_pretrained(again)
    stored = load_file(again / "model.safetensors")
    assert stored.keys() == made.stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in made.stored.items())


def test_sharded(packed: Packed, ids: torch.Tensor, tmp_path: Path) -> None:
    model = load(packed("mixtral").path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "shards"), ids), logits(model, ids))


def test_the_base_model_alone(packed: Packed, ids: torch.Tensor, tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "bert"):
        made = packed(family)
        options = {"add_pooling_layer": False} if family == "bert" else {}
        base = load(made.path, AutoModel, **options)
        prefix = made.reference.base_model_prefix
        want = getattr(made.reference, prefix)(ids).last_hidden_state
        assert_close(base(ids).last_hidden_state, want, 0.05)
        base.save_pretrained(tmp_path / f"{family}-base")
        names = json.loads((tmp_path / f"{family}-base" / "config.json").read_text())["quantization_config"]["tensors"]
        assert names and not any(name.startswith((prefix + ".", "lm_head", "cls")) for name in names)
        assert torch.equal(load(tmp_path / f"{family}-base", AutoModel, **options)(ids)[0], base(ids)[0])
    # and a base checkpoint under a head: the head is new, and transformers says so
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


# -- ties


def test_a_tied_head_shares_the_table(packed: Packed, ids: torch.Tensor) -> None:
    for family, auto in (("gemma3", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)):
        made = packed(family)
        model = load(made.path, auto)
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, QuantLinear) and isinstance(table, QuantEmbedding) and head.tied_to is table
        want = logits(model, ids)
        model.tie_weights()  # what a user, or accelerate, may call later
        assert torch.equal(logits(model, ids), want)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert model.cls.predictions.bias.shape == (203,)


def test_a_head_with_a_weight_of_its_own_is_untied(packed: Packed, ids: torch.Tensor) -> None:
    for kept in (None, {"codec": "int", "bits": 8}):
        made = packed("qwen2", lambda n, w, kept=kept: kept if w.embedding else {"codec": "int", "bits": 4})
        head = quantize_tensor(made.reference.lm_head.weight, {"codec": "int", "bits": 3})
        made.reference.lm_head.weight = nn.Parameter(head.dequantize())

        def add(config: dict[str, Any], head: Any = head) -> None:
            config["schemes"].append(head.scheme.to_dict())
            entry = {"scheme": len(config["schemes"]) - 1, "shape": list(head.shape)}
            config["tensors"]["lm_head.weight"] = entry

        edit_config(made.path, add)
        fields = {"lm_head.weight": head.fields["codes"], "lm_head.weight_scale": head.fields["scale"]}
        edit_tensors(made.path, lambda t, fields=fields: t.update(fields))
        model = load(made.path)
        assert model.lm_head.tied_to is None and isinstance(model.model.embed_tokens, QuantEmbedding) == bool(kept)
        assert_close(logits(model, ids), logits(made.reference, ids), 0.05)
        plain = model.dequantize()
        assert plain.lm_head.weight is not plain.model.embed_tokens.weight
        assert_close(logits(plain, ids), logits(made.reference, ids), 1e-4)


# -- outside of from_pretrained


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral", "bert"])
def test_replace_modules_in_memory(
    families: Any, checkpoint: Callable[..., Path], packed: Packed, family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Also for a model that was itself loaded: its per-expert conversions must not mangle what is saved."""
    made = packed(family)
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model = load(checkpoint(family), auto)
    assert hf.replace_modules(model, made.tensors) is model
    want = logits(load(made.path, auto), ids)
    assert torch.equal(logits(model, ids), want)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", auto), ids), want)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == made.stored.keys()


def test_replace_modules_on_meta(packed: Packed, ids: torch.Tensor) -> None:
    made = packed("qwen3_moe")
    config = AutoConfig.from_pretrained(made.path)
    native = NativeConfig.parse(config.quantization_config, "config.json")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    hf.replace_modules(skeleton, native)
    assert skeleton.state_dict().keys() == made.stored.keys()
    for name, tensor in skeleton.state_dict().items():
        assert tensor.shape == made.stored[name].shape and tensor.device.type == "meta"


def test_experts_partly_quantized(families: Any, packed: Packed, ids: torch.Tensor) -> None:
    made = packed("mixtral", lambda n, w: {"codec": "int", "bits": 8} if n.endswith("experts.down_proj") else None)
    model = load(made.path)
    memory = hf.replace_modules(families["mixtral"](), made.tensors)
    for made_so in (model, memory):
        experts = made_so.model.layers[0].mlp.experts
        assert isinstance(experts, QuantExperts) and isinstance(experts.gate_up_proj, nn.Parameter)
        assert_close(logits(made_so, ids), logits(made.reference, ids), 0.05)
    assert_close(logits(model.dequantize(), ids), logits(made.reference, ids), 1e-4)


def test_registering_twice_is_harmless(packed: Packed, ids: torch.Tensor) -> None:
    made = packed("llama")
    importlib.reload(hf)
    assert isinstance(load(made.path).lm_head, QuantLinear)


# -- what is refused, in one line


def refused(path: Path, match: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        AutoModelForCausalLM.from_pretrained(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_format_from_the_future(packed: Packed) -> None:
    made = packed("llama")
    edit_config(made.path, lambda q: q.update(format_version=99, something_new=1))
    refused(made.path, "newer bitpalette .format 99, .*upgrade")


@pytest.mark.parametrize("missing", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_field(packed: Packed, missing: str) -> None:
    made = packed("llama")
    edit_tensors(made.path, lambda t: t.pop(missing))
    refused(made.path, rf"tensor '{missing}' is missing")


def test_a_missing_field_of_a_state_dict(packed: Packed) -> None:
    made = packed("llama")
    config = AutoConfig.from_pretrained(made.path)
    whole = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(made.stored))
    assert isinstance(whole.lm_head, QuantLinear)
    state = {k: v for k, v in made.stored.items() if k != "lm_head.weight_scale"}
    with pytest.raises(ValueError, match=r"'lm_head\.weight_scale' is missing"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


def test_a_field_of_another_dtype_or_shape(packed: Packed) -> None:
    made = packed("llama")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    edit_tensors(made.path, lambda t: t.update({name: t[name].float()}))
    refused(made.path, f"{name}.*torch.float32.*needs torch.float16")
    edit_tensors(made.path, lambda t: t.update({name: t[name].half()[:3]}))
    refused(made.path, f"{name}.*needs torch.float16")


def test_a_config_that_lies_about_shapes(packed: Packed) -> None:
    """Consistent with the file, so that only the model can tell."""
    made = packed("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    other = quantize_tensor(torch.randn(72, 100), {"codec": "int", "bits": 4, "group_size": 32})

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: other.fields["codes"], f"{name}_scale": other.fields["scale"]}

    edit_tensors(made.path, swap)
    edit_config(made.path, lambda q: q["tensors"][name].update(shape=[72, 100]))
    refused(made.path, rf"{name}.*\[72, 100\] in the config, \[100, 72\] in the model")


def test_entries_for_what_does_not_exist_or_cannot_be_packed(packed: Packed) -> None:
    extra = quantize_tensor(torch.randn(4, 72), {"codec": "int", "bits": 4, "group_size": 32})
    for name, match in (
        ("model.layers.7.mlp.up_proj.weight", "is no parameter of MixtralForCausalLM"),
        ("lm_heed.weight", "is no parameter of MixtralForCausalLM"),
        ("model.layers.0.mlp.gate.weight", "is of a kind no packed module computes"),  # a router, not a Linear
    ):
        made = packed("mixtral")
        fields = {name: extra.fields["codes"], f"{name}_scale": extra.fields["scale"]}
        edit_tensors(made.path, lambda t, fields=fields: t.update(fields))
        edit_config(made.path, lambda q, name=name: q["tensors"].update({name: {"scheme": 1, "shape": [4, 72]}}))
        refused(made.path, match)


def test_quantizing_on_the_fly_is_refused(checkpoint: Callable[..., Path], packed: Packed) -> None:
    made = packed("llama")
    native = AutoConfig.from_pretrained(made.path).quantization_config
    refused(checkpoint("llama"), "quantize run", quantization_config=hf.BitpaletteConfig(**native))


def test_an_embedding_that_changes_its_rows_is_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    model = nn.Module()
    model.table = Shifted(20, 16)
    model.get_input_embeddings = lambda: model.table
    qt = quantize_tensor(model.table.weight, {"codec": "int", "bits": 8})
    with pytest.raises(ValueError, match="Shifted changes its rows"):
        hf.replace_modules(model, {"table.weight": qt})


def test_stacks_of_the_wrong_number_of_experts(families: Any) -> None:
    model = families["mixtral"]()
    name = "model.layers.0.mlp.experts.down_proj"
    qt = stack([quantize_tensor(w, {"codec": "int", "bits": 8}) for w in model.get_parameter(name)[:3]])
    with pytest.raises(ValueError, match=r"\[3, 72, 100\] in the config, \[4, 72, 100\]"):
        hf.replace_modules(model, {name: qt})
