"""A checkpoint with a plan keeps a packed cache by itself, however it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import bitpalette
from bitpalette.formats.directory import DirectorySource
from bitpalette.formats.kv_plan_file import KV_PLAN_NAME, StoredKVPlan, read_kv_plan, write_kv_plan
from bitpalette.formats.manifest import is_complete, write_manifest
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_layer import PackedLayer
from bitpalette.kv_static_layer import StaticPackedLayer
from bitpalette.kv_use import apply_spec, drop_plan, plan_of, use_plan
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.kv_plan import KVPlan

LAYERS = 2
SMALL = KVFormat(3, 2, 2, 4)


def plan(form: KVFormat = SMALL) -> KVPlan:
    generator = torch.Generator().manual_seed(5)
    return KVPlan(form, {1: KVFormat(2, 2, 2, 4)}, {0: torch.randn(2, 16, generator=generator)})


def llama() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=99, **sizes, head_dim=16, num_hidden_layers=LAYERS, eos_token_id=None, max_position_embeddings=256
    )
    model = LlamaForCausalLM(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.15)
    return model


@pytest.fixture
def with_plan(tmp_path: Path) -> Path:
    """A packed checkpoint with a plan."""
    folder = tmp_path / "packed"
    linear = {"codec": "int", "bits": 8, "group_size": 0}
    model = bitpalette.quantize_model(llama(), {"linear": linear, "solver": "rtn"})
    bitpalette.save_pretrained(model, folder)
    write_kv_plan(folder, StoredKVPlan(plan()))
    return folder


IDS = torch.randint(4, 90, (2, 30), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


def generated(model: Any, **options: Any) -> Any:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **(GREEDY | options))


def forms(cache: Any) -> list[KVFormat]:
    assert isinstance(cache, QuantizedCache)
    return [layer.form for layer in cache.layers if isinstance(layer, PackedLayer)]


@torch.no_grad()
@pytest.mark.parametrize("load", [bitpalette.load, AutoModelForCausalLM.from_pretrained])
def test_loading_uses_the_plan(with_plan: Path, load: Callable[..., Any]) -> None:
    model = load(str(with_plan)).eval()
    assert model.config._attn_implementation == "bitpalette"
    out = generated(model)
    assert forms(out.past_key_values) == [SMALL, KVFormat(2, 2, 2, 4)]
    assert torch.equal(out.past_key_values.plan.means[0], plan().means[0])
    assert forms(model(input_ids=IDS).past_key_values) == [SMALL, KVFormat(2, 2, 2, 4)]
    # as with the same cache made by hand
    by_hand = drop_plan(model)
    expected = generated(by_hand, past_key_values=QuantizedCache(model.config, plan()))
    assert torch.equal(out.sequences, expected.sequences)


@torch.no_grad()
def test_overrides(with_plan: Path) -> None:
    off = bitpalette.load(with_plan, kv="16")
    assert isinstance(generated(off).past_key_values, DynamicCache)
    assert isinstance(off(input_ids=IDS).past_key_values, DynamicCache)
    assert plan_of(off) is None
    uniform = bitpalette.load(with_plan, kv="k4v4")
    assert forms(generated(uniform).past_key_values) == [KVFormat(4, 4, 2, 4)] * LAYERS
    stored = plan_of(uniform)
    assert stored is not None and 0 in stored.plan.means
    with pytest.raises(KVError, match="sensitivities"):
        bitpalette.load(with_plan, kv="auto:3.25")


def test_dense_cache_without_a_plan(with_plan: Path) -> None:
    (with_plan / KV_PLAN_NAME).unlink()
    write_manifest(with_plan)
    model = bitpalette.load(with_plan)
    assert plan_of(model) is None and isinstance(generated(model).past_key_values, DynamicCache)


def test_exact_pages_generate_the_tokens_of_the_dense_cache() -> None:
    model = llama()
    expected = generated(model).sequences
    use_plan(model, KVPlan(KVFormat(16, 16, 2, 4)))
    assert torch.equal(generated(model).sequences, expected)
    assert torch.equal(generated(model, num_beams=3).sequences, generated(drop_plan(model), num_beams=3).sequences)


@torch.no_grad()
def test_bare_forwards() -> None:
    model = use_plan(llama(), plan())
    dense = DynamicCache(config=model.config)
    assert model(input_ids=IDS, past_key_values=dense).past_key_values is dense
    assert model(input_ids=IDS, use_cache=False).past_key_values is None
    assert isinstance(model(IDS, None, None, None).past_key_values, QuantizedCache)  # given by place
    assert model(IDS, None, None, dense).past_key_values is dense
    # the cache that came back is gone on with
    use_plan(model, KVPlan(KVFormat(16, 16, 2, 4)))
    whole = model(input_ids=IDS).logits[:, -1]
    first = model(input_ids=IDS[:, :-1]).past_key_values
    assert (model(input_ids=IDS[:, -1:], past_key_values=first).logits[:, -1] - whole).abs().max() <= 1e-4
    assert first.get_seq_length() == 30
    model.config.use_cache = False
    assert model(input_ids=IDS).past_key_values is None


def test_not_in_training() -> None:
    model = use_plan(llama(), plan()).train()
    out = model(input_ids=IDS, labels=IDS)
    assert not isinstance(out.past_key_values, QuantizedCache)
    out.loss.backward()
    past = model.eval()(input_ids=IDS).past_key_values  # a first prompt reads no pages
    with pytest.raises(KVError, match="carry no gradients; train with use_cache=False"):
        model(input_ids=IDS[:, :1], past_key_values=past).logits.sum().backward()
    assert model(input_ids=IDS, use_cache=False).logits.requires_grad


def test_a_cache_that_is_asked_for_by_name_is_given() -> None:
    model = use_plan(llama(), plan())
    assert not isinstance(generated(model, cache_implementation="dynamic").past_key_values, QuantizedCache)
    assert not isinstance(generated(model, use_cache=False).past_key_values, QuantizedCache)
    static = generated(model, cache_implementation="static", disable_compile=True).past_key_values
    assert all(isinstance(layer, StaticPackedLayer) for layer in static.layers)
    model.generation_config.cache_implementation = "dynamic"  # of the checkpoint, not of the call
    assert isinstance(generated(model).past_key_values, QuantizedCache)


def test_assisted_decoding_takes_tokens_back() -> None:
    model, assistant = use_plan(llama(), KVPlan(KVFormat(16, 16, 2, 4))), use_plan(llama(), plan())
    one = {"attention_mask": torch.ones_like(IDS[:1]), "max_new_tokens": 12, "do_sample": False}
    expected = llama().generate(IDS[:1], **one)
    assert torch.equal(model.generate(IDS[:1], assistant_model=assistant, **one), expected)


def test_another_attention_was_asked_for(with_plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(with_plan, attn_implementation="eager")
    assert plan_of(model) is None and model.config._attn_implementation == "eager"
    told = capsys.readouterr().err
    assert told.count("the plan of the KV cache is not used, attention 'eager' was asked for") == 1


def test_one_plan_at_a_time() -> None:
    model = llama()
    before = len(model._forward_pre_hooks)
    for form in (SMALL, KVFormat(4, 4, 2, 4)):
        use_plan(model, KVPlan(form))
        assert forms(generated(model).past_key_values) == [form] * LAYERS
    drop_plan(model)
    assert len(model._forward_pre_hooks) == before and "_prepare_cache_for_generation" not in vars(model)


def test_a_copy_has_a_plan_of_its_own() -> None:
    model = use_plan(llama(), plan())
    other = copy.deepcopy(model)
    drop_plan(model)
    assert isinstance(generated(other).past_key_values, QuantizedCache)
    assert isinstance(generated(model).past_key_values, DynamicCache)


def test_saving_keeps_the_plan(with_plan: Path, tmp_path: Path) -> None:
    bitpalette.save_pretrained(bitpalette.load(with_plan), tmp_path / "again")
    assert is_complete(tmp_path / "again")
    found = read_kv_plan(tmp_path / "again")
    assert found is not None and found.plan.layers == plan().layers
    assert torch.equal(found.plan.means[0], plan().means[0])


def test_compiling_a_checkpoint_keeps_its_plan(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "plain")
    write_kv_plan(tmp_path / "plain", StoredKVPlan(plan()))
    DirectorySource(tmp_path / "plain").write_sidecar(tmp_path / "sidecar")
    assert (tmp_path / "sidecar" / KV_PLAN_NAME).exists()
    scheme = {"linear": {"codec": "int", "bits": 8, "group_size": 0}, "solver": "rtn"}
    bitpalette.compile_checkpoint(str(tmp_path / "plain"), tmp_path / "out", scheme)
    assert is_complete(tmp_path / "out")
    assert isinstance(generated(bitpalette.load(tmp_path / "out")).past_key_values, QuantizedCache)


def test_native_generation_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    from bitpalette.generation import why_not

    model = use_plan(llama(), plan())
    assert "its cache is packed" in str(why_not(model, IDS[:1], {}))
    assert "its cache is packed" not in str(why_not(drop_plan(model), IDS[:1], {}))


def test_plans_that_do_not_fit() -> None:
    model = llama()
    for bad in (KVPlan(SMALL, {7: SMALL}), KVPlan(SMALL, {}, {7: torch.zeros(2, 16)})):
        with pytest.raises(KVError, match=r"the plan names layers \[7\]"):
            use_plan(model, bad)
    assert plan_of(model) is None
    assert plan_of(apply_spec(model, "k4v4", None)) is not None
