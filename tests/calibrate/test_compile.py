"""A checkpoint in, a packed one out: every family, all that is stored, the sizes told beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpalette
from bitpalette.calibrate.collect import Moment
from bitpalette.calibrate.compile import Compilation
from bitpalette.calibrate.journal import Journal
from bitpalette.calibrate.plan import Plan, PlanError, Rule
from bitpalette.calibrate.report import Events, Record
from bitpalette.calibrate.structure import quantizable
from bitpalette.calibrate.text import Calibration, sequences
from bitpalette.calibrate.whole import load_model, load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.manifest import is_complete
from bitpalette.formats.native import NativeSource, open_native
from bitpalette.formats.verify import verify
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.stats import output_error
from bitpalette.recipe import make_plan

Make = Callable[..., Compilation]
Tree = Callable[[Path], dict[str, "bytes | None"]]

INT4 = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 16})


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have tolerances of their own; here the question is whether the right numbers are in the right place."""
    monkeypatch.setenv("BITPALETTE_KERNEL", "reference")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def decoded(original: Path, packed: Path) -> Any:
    """The original model with the weights that the packed checkpoint holds: those decoded, these as they are."""
    model, source = load_model(open_source(original), torch.float32), open_native(packed)
    state = model.state_dict()
    for name in source.tensors:
        if name in source.quantized_names:
            w = source.read_quantized(name).dequantize()
            conv1d = quantizable(model)[name].kind == "conv1d"
            state[name].copy_(w.T if conv1d else w)
        elif name in state:
            state[name].copy_(source.read(name))
    return model


RUNS = {"rtn": {"solver": "rtn"}, "gptq, rotated": {"solver": "gptq", "fold": False}}


@pytest.mark.parametrize("options", list(RUNS))
def test_every_family(
    checkpoint: Callable[..., Path], compilation: Make, family: str, options: str, ids: torch.Tensor
) -> None:
    model = checkpoint(family)
    out = model.parent / "out"
    run = compilation(model, out, **RUNS[options])
    sizes = run.sizes()
    records = run.run()
    assert {p.name: p.stat().st_size for p in out.glob("*.safetensors*")} == sizes.files
    assert list(verify(out)) == []
    weights = quantizable(load_model(open_source(model), torch.float32))
    assert {r.parameter for r in records} == {n for n, w in weights.items() if not w.router}
    for record in records:
        assert record.shape == weights[record.parameter].shape
        assert ("+rotate" in record.scheme) == ("rotated" in options and "blocks" in where(record.parameter, run))
        assert 0 < record.error < 0.03
        calibrated = options != "rtn" and (where(record.parameter, run) == "blocks" or weights[record.parameter].head)
        if weights[record.parameter].kind != "experts":
            assert (record.tokens == 128) == calibrated
    loaded = bitpalette.load(out)
    assert distance(logits(loaded, ids), logits(decoded(model, out), ids)) < 1e-5
    assert all(p.is_meta for n, p in run.skeleton.model.named_parameters())


def where(name: str, run: Compilation) -> str:
    return "outside" if run.skeleton.block_of(name) is None else "blocks"


@pytest.mark.parametrize(("family", "solver"), [("llama", "awq"), ("gpt2", "awq+gptq")])
def test_scaled(
    family: str, solver: str, checkpoint: Callable[..., Path], compilation: Make, ids: torch.Tensor
) -> None:
    model = checkpoint(family)
    out = model.parent / "out"
    records = compilation(model, out, solver=solver, rotate=False).run()
    assert any("+scale" in r.scheme for r in records)
    assert distance(logits(bitpalette.load(out), ids), logits(decoded(model, out), ids)) < 1e-5


def test_calibration_helps(checkpoint: Callable[..., Path], compilation: Make) -> None:
    """The error that is reported is that of the layer's output: gptq exists to lower it."""
    model = checkpoint("llama")
    with_stats = compilation(model, model.parent / "a", bits=3, rotate=False, sequences=16).run()
    nearest = compilation(model, model.parent / "b", bits=3, solver="rtn").run()
    name = "model.layers.1.mlp.down_proj.weight"
    source, original = open_native(model.parent / "b"), open_source(model)
    tokens = sequences(Calibration("builtin", 512, 32), load_tokenizer(original))
    moment = Moment(100)
    whole = load_model(original, torch.float32)
    whole.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda m, args: moment.add(args[0]))
    with torch.no_grad():
        whole(tokens)
    stats = moment.stats()
    w = original.read(name)
    rtn = output_error(w, source.read(name), stats)
    gptq = output_error(w, open_native(model.parent / "a").read(name), stats)
    assert gptq < 0.8 * rtn
    reported = {r.parameter: r.error for r in with_stats}[name]
    assert reported == pytest.approx(gptq, rel=0.3)  # its own input came from quantized layers
    assert {r.parameter: r.error for r in nearest}[name] == pytest.approx(
        float((source.read(name) - w).square().sum() / w.square().sum()), rel=1e-4
    )


def test_shards(checkpoint: Callable[..., Path], compilation: Make, ids: torch.Tensor) -> None:
    """Many files in, many files out; the same tensors as in one."""
    model = checkpoint("llama", max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    one, many = model.parent / "one", model.parent / "many"
    compilation(model, one, solver="rtn").run()
    run = compilation(model, many, solver="rtn", max_shard_bytes=20_000)
    sizes = run.sizes()
    run.run()
    written = {p.name: p.stat().st_size for p in many.glob("*.safetensors*")}
    assert written == sizes.files and len(written) > 4 and "model.safetensors.index.json" in written
    a, b = NativeSource(one), NativeSource(many)
    assert set(a.stored) == set(b.stored)
    for name in a.stored:
        assert torch.equal(a.read_stored(name), b.read_stored(name)), name
    assert torch.equal(logits(bitpalette.load(one), ids), logits(bitpalette.load(many), ids))


def test_again_changes_nothing(checkpoint: Callable[..., Path], compilation: Make, tree: Tree) -> None:
    model = checkpoint("llama")
    out = model.parent / "out"
    notes: list[str] = []
    records = compilation(model, out, solver="rtn").run()
    before = tree(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = compilation(model, out, solver="rtn", events=Events(note=notes.append)).run()
    assert again == records and tree(out) == before
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert notes == [f"{out} is complete already"]
    with pytest.raises(FormatError, match="finished checkpoint of other settings"):
        compilation(model, out, solver="rtn", seed=1).run()
    assert tree(out) == before


def test_what_stands_beside_the_weights(checkpoint: Callable[..., Path], compilation: Make) -> None:
    model = checkpoint("llama", torch.bfloat16)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    out = model.parent / "out"
    compilation(model, out, solver="rtn").run()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "bitpalette"
    assert config == json.loads((model / "config.json").read_text())
    assert is_complete(out) and not (out / ".bitpalette").exists()
    assert "pip install bitpalette" in (out / "README.md").read_text()
    assert not list(out.rglob("*.partial"))


def test_sixteen_bits_are_a_plain_checkpoint(checkpoint: Callable[..., Path], compilation: Make, ids: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = checkpoint("qwen2", torch.bfloat16)
    out = model.parent / "out"
    run = compilation(model, out, bits=16)
    assert run.sizes().bits_per_weight == 16.0
    assert run.run() == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    want, got = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded, ids), logits(AutoModelForCausalLM.from_pretrained(model), ids))


def test_rules(checkpoint: Callable[..., Path], compilation: Make, ids: torch.Tensor) -> None:
    model = checkpoint("llama")
    out = model.parent / "out"
    run = compilation(
        model,
        out,
        solver="rtn",
        keep=["layers.0.self_attn.*", "lm_head"],
        set_=["down_proj=bits=2", "re:1.*up=lut,entries=16"],
    )
    schemes = {r.parameter: r.scheme for r in run.run()}
    assert not [n for n in schemes if "layers.0.self_attn" in n or "lm_head" in n]
    stored = load_file(out / "model.safetensors")
    original = load_file(model / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(stored[name], original[name])
    for layer in (0, 1):
        assert schemes[f"model.layers.{layer}.mlp.down_proj.weight"] == "int bits=2 group_size=16"
    assert schemes["model.layers.1.mlp.up_proj.weight"].startswith("lut")
    assert schemes["model.layers.0.mlp.up_proj.weight"].startswith("int")
    assert distance(logits(bitpalette.load(out), ids), logits(decoded(model, out), ids)) < 1e-5


def test_tied_weights_are_stored_once(checkpoint: Callable[..., Path], compilation: Make) -> None:
    model = checkpoint("qwen3")
    for head, out in ((8, model.parent / "a"), (16, model.parent / "b")):
        records = compilation(model, out, solver="rtn", head_bits=head).run()
        stored = NativeSource(out).stored
        assert not [n for n in stored if "lm_head" in n]
        assert ("model.embed_tokens.weight_scale" in stored) == (head == 8)
        assert len([r for r in records if r.parameter == "model.embed_tokens.weight"]) == (head == 8)


def test_a_tied_head_is_calibrated(checkpoint: Callable[..., Path], compilation: Make) -> None:
    model = checkpoint("qwen3")
    records = {r.parameter: r for r in compilation(model, model.parent / "out", head_bits=4).run()}
    assert records["model.embed_tokens.weight"].tokens == 128
    assert "rotate" not in records["model.embed_tokens.weight"].scheme


def test_rules_may_use_either_name_of_a_tied_weight(checkpoint: Callable[..., Path], compilation: Make) -> None:
    model = checkpoint("qwen3")
    for pattern in ("lm_head", "embed_tokens", "lm_head.weight"):
        run = compilation(model, model.parent / "out", solver="rtn", set_=[f"{pattern}=int,bits=5"])
        assert run.schemes["model.embed_tokens.weight"] == Scheme.from_dict({"codec": "int", "bits": 5})


def test_experts_one_by_one(checkpoint: Callable[..., Path], compilation: Make, ids: torch.Tensor) -> None:
    """One of them is never chosen: it is rounded with the statistics of the others."""
    model = checkpoint("qwen3_moe")
    tensors = load_file(model / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[:] = torch.tensor([1.0, 0.9, -1.0, -0.9, 0.0])[:, None] * gate[0]  # the best two are 0, 1 or 2, 3

    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = model.parent / "out"
    records = {r.parameter: r for r in compilation(model, out, rotate=False).run()}
    stack = records["model.layers.0.mlp.experts.down_proj"]
    assert stack.tokens == 0 and stack.shape == (5, 72, 44)
    assert records["model.layers.1.mlp.experts.down_proj"].tokens > 0
    qt = open_native(out).read_quantized("model.layers.0.mlp.experts.down_proj")
    original = load_model(open_source(model), torch.float32).get_parameter("model.layers.0.mlp.experts.down_proj")
    for got, want in zip(qt.dequantize(), original, strict=True):
        assert 0 < distance(got, want) < 0.2
    assert distance(logits(bitpalette.load(out), ids), logits(decoded(model, out), ids)) < 1e-5


def test_experts_of_an_unknown_layout(tmp_path: Path, compilation: Make) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=203, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
        layer_types=["full_attention"],
    )  # fmt: skip
    model = tmp_path / "gpt-oss"
    transformers.GptOssForCausalLM(config).save_pretrained(model)
    with pytest.raises(PlanError, match=r"experts\.\w+ cannot be quantized: .*--keep model.layers.0.mlp.experts"):
        compilation(model, tmp_path / "out", solver="rtn")
    with pytest.raises(PlanError, match="which can only be kept"):
        compilation(model, tmp_path / "out", solver="rtn", set_=["experts=bits=8"])
    run = compilation(model, tmp_path / "out", solver="rtn", keep=["experts"])
    assert run.run() and "model.layers.0.mlp.experts.down_proj" in NativeSource(tmp_path / "out").stored
    assert compilation(model, tmp_path / "plain", bits=16).run() == []


def test_buffers_of_the_checkpoint_are_carried(tmp_path: Path, compilation: Make) -> None:
    """Some architectures store buffers: layer_scalar of Gemma, biases of routers of DeepSeek-V3."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=203, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    made = transformers.DeepseekV3ForCausalLM(config)
    name = next(n for n, _ in made.named_buffers() if n.endswith("e_score_correction_bias"))
    made.get_buffer(name)[:] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    model = tmp_path / "model"
    made.save_pretrained(model)
    compilation(model, tmp_path / "out", solver="rtn", group_size=8).run()
    assert torch.equal(bitpalette.load(tmp_path / "out").get_buffer(name), made.get_buffer(name))


def test_originals_are_let_go(
    checkpoint: Callable[..., Path], compilation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a block's weights are written nothing else of the model is in memory."""
    model = checkpoint("llama")
    run = compilation(model, model.parent / "out")
    loaded: list[set[int | None]] = []

    def look() -> None:
        here = {n for n in run.skeleton.parameters if not run.skeleton.get(n).is_meta}
        loaded.append({run.skeleton.block_of(n) for n in here})

    def add(self: Journal, part: Any, original: Any = Journal.add) -> None:
        look()
        original(self, part)

    monkeypatch.setattr(Journal, "add", add)
    one = type(run.skeleton.blocks[0][1])
    forward = one.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        look()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(one, "forward", watched)
    run.run()
    assert loaded and all(len(blocks) <= 1 for blocks in loaded)
    assert set() in loaded and {0} in loaded and {1} in loaded


def test_dtypes_that_differ_from_the_config(checkpoint: Callable[..., Path], compilation: Make, ids: Any) -> None:
    """A bf16 model whose norms are float32 in the file."""
    model = checkpoint("llama", torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    tensors = {k: v.float() if "norm" in k else v for k, v in tensors.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = model.parent / "out"
    run = compilation(model, out)
    run.run()
    assert {p.name: p.stat().st_size for p in out.glob("*.safetensors*")} == run.sizes().files
    assert list(verify(out)) == []
    assert distance(logits(bitpalette.load(out, dtype=torch.float32), ids), logits(decoded(model, out), ids)) < 1e-5


def test_hidden_states_in_bfloat16(checkpoint: Callable[..., Path], compilation: Make) -> None:
    model = checkpoint("llama", torch.bfloat16)
    a = compilation(model, model.parent / "a").run()
    b = compilation(model, model.parent / "b", dtype="bfloat16").run()
    assert a != b
    for x, y in zip(a, b, strict=True):
        assert y.error == pytest.approx(x.error, rel=0.3)


def test_refused_before_anything_is_written(checkpoint: Callable[..., Path], tree: Tree) -> None:
    model = checkpoint("qwen2")
    before = tree(model.parent)
    source = open_source(model)
    cases: list[tuple[Plan, dict[str, Any], str]] = [
        (make_plan(group_size=16), {"calibration": None}, "needs a calibration text"),
        (make_plan(group_size=16), {"dtype": "float31"}, "'float31'"),
        (make_plan(group_size=16, head_bits=16, embed_bits=8), {}, "one tensor \\(tied\\)"),
        (make_plan(group_size=73), {}, "wider than the weight's 72 columns"),
        (Plan(INT4, rules=(Rule("nothing", None),)), {}, "'nothing' matches none of 15 weights"),
        (Plan(INT4, solver="nonsuch"), {}, "unknown solver"),
    ]
    for plan, options, message in cases:
        arguments: dict[str, Any] = {"calibration": Calibration("builtin", 64, 32)} | options
        with pytest.raises(ValueError, match=message) as caught:
            Compilation(source, plan, model.parent / "out", **arguments)
        assert "\n" not in str(caught.value)
    assert tree(model.parent) == before


def test_interface(checkpoint: Callable[..., Path], compilation: Make, tree: Tree) -> None:
    """`bitpalette.compile_checkpoint` takes paths and a plan as a dict, and does the same."""
    model = checkpoint("llama")
    plan = make_plan(group_size=16, solver="rtn")
    records = bitpalette.compile_checkpoint(str(model), str(model.parent / "a"), plan.to_dict())
    assert all(isinstance(r, Record) for r in records)
    compilation(model, model.parent / "b", plan=plan).run()
    a, b = tree(model.parent / "a"), tree(model.parent / "b")
    assert a["model.safetensors"] == b["model.safetensors"]


def test_statistics_go_by_what_the_text_says(
    checkpoint: Callable[..., Path], compilation: Make, tmp_path: Path
) -> None:
    """A copy of the text in another place finds the statistics; another text does not."""
    model = checkpoint("llama")
    texts = {"a": "one two three four " * 200, "copy": "one two three four " * 200, "other": "five six seven " * 200}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    own = {"solver": "gptq", "stats": tmp_path / "stats"}
    compilation(model, tmp_path / "x", text=str(tmp_path / "a"), **own).run()
    records = compilation(model, tmp_path / "y", text=str(tmp_path / "copy"), **own).run()
    assert records[0].tokens == 128
    with pytest.raises(FormatError, match="another calibration"):
        compilation(model, tmp_path / "z", text=str(tmp_path / "other"), **own).run()
