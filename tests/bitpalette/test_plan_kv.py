"""`quantize plan-kv`, from text to a checkpoint that keeps a packed cache."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import bitpalette
from bitpalette.cli import main
from bitpalette.evaluation import load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.formats.kv_plan_file import KV_PLAN_NAME, read_kv_plan
from bitpalette.formats.manifest import is_complete
from bitpalette.kv_planning import KVBudget, KVPlanner, KVText, spearman
from bitpalette.kv_use import plan_of
from bitpalette.quant.kv_format import KVError

PROSE = " ".join(
    f"{n} times {n + 1} is {n * (n + 1)}, and {n} less {7 * n % 11} is {n - 7 * n % 11}." for n in range(200)
)
SMALL = ("--tokens", "400", "--lengths", "168,200", "--window", "8", "--mixes", "3", "--kl-tokens", "200")
SIZES: dict[str, Any] = {
    "vocab_size": 110,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model(tmp_path: Path, checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with the tiny tokenizer of the other tests, and heads that can be packed."""
    folder = checkpoint("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0)).save_pretrained(folder)
    (tmp_path / "prose.txt").write_text(PROSE)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
        code = main()
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_a_plan_for_a_packed_checkpoint(model: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    out = model.parent / "packed"
    assert call("run", model, out, "--group-size", "16", "--solver", "rtn")[0] == 0
    code, shown, err = call("plan-kv", out, *SMALL, "--text", model.parent / "prose.txt", "--bits", "4.6", "--json")
    assert code == 0, err
    told = json.loads(shown)
    assert told["out"] == str(out / KV_PLAN_NAME)
    assert 4 <= told["bits_per_element"] <= 4.6
    assert told["predicted_kl"] > 0 and len(told["layers"]) == 3 and told["spearman"] is not None
    assert is_complete(out)
    stored = read_kv_plan(out)
    assert stored is not None and stored.calibration is not None
    found = stored.calibration
    assert found.lengths == [168, 200] and found.tokens == 368 and len(found.mixes) == 3
    assert found.text_name == "prose.txt" and found.model == open_source(str(out)).fingerprint()
    assert {n: t.shape for n, t in stored.plan.means.items()} == dict.fromkeys(range(3), (2, 16))
    for layer in found.layers.values():
        assert set(layer.errors) == {168, 200} and len(layer.errors[200]) == 24
        assert layer.slope_k > 0 and layer.slope_v > 0
    chosen = plan_of(bitpalette.load(out))
    assert chosen is not None
    pairs = {n: (form.bits_k, form.bits_v) for n, form in chosen.plan.layers.items()}
    assert pairs == {int(n): (one["bits_k"], one["bits_v"]) for n, one in told["layers"].items()}
    assert call("verify", out)[0] == 0

    # other budgets are solved from what was measured
    code, shown, err = call(
        "plan-kv", out, *SMALL, "--text", model.parent / "prose.txt", "--bytes", "120kB", "--context", "1000"
    )
    assert code == 0 and "measured before on this model and text" in err
    assert "K bits" in shown and "for this context" in shown
    solved = read_kv_plan(out)
    assert solved is not None and solved.calibration is not None
    assert solved.calibration.layers == found.layers and "120,000 bytes" in solved.calibration.budget
    again = plan_of(bitpalette.load(out, kv="auto:12"))
    assert again is not None and again.plan.layers != solved.plan.layers
    code, shown, err = call("generate", out, "--prompt", "a b c", "--max-new-tokens", "3", "--kv", "auto:5")
    assert code == 0, err
    assert err == "" or "its cache is packed" in err  # the reason is told once a process


def test_a_plan_for_a_plain_model(model: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    place = tmp_path / "plans" / "mine.safetensors"
    code, shown, err = call(
        "plan-kv", model, *SMALL, "--text", model.parent / "prose.txt", "--bits", "5", "--out", place, "--sinks", "2"
    )
    assert code == 0, err
    for part in (
        "layer",
        "K bits",
        "predicted KL",
        "bits an element in",
        "2 sinks, window 8",
        "random mixes",
        "written",
    ):
        assert part in shown
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    options = ("generate", model, "--prompt", "a b c", "--max-new-tokens", "3")
    assert call(*options, "--kv", f"plan@{place}")[0] == 0
    # a plan of the folder itself is used without being asked for, and goes along into what is compiled from it
    shutil.copy(place, model / KV_PLAN_NAME)
    assert call(*options)[0] == 0
    assert call("run", model, tmp_path / "out", "--group-size", "16", "--solver", "rtn")[0] == 0
    assert plan_of(bitpalette.load(tmp_path / "out")) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say where the plan goes with --out"),
        (("--bits", "3", "--bytes", "1MB"), "give one of --bits and --bytes"),
        (("--bytes", "1MB"), "give --context"),
        (("--bytes", "much", "--context", "9"), "is no size"),
        (("--lengths", "100"), "give --lengths of 208 or more"),
        (("--lengths", "long"), "are no numbers of tokens"),
        (("--lengths", "4096"), "are longer than the 512 positions"),
        (("--text", "self"), "plans are measured on written text"),
        (("--dtype", "int8"), "--dtype is one of"),
        (("--mixes", "-1"), "--mixes 0 or more"),
        (("--window", "-1", "--lengths", "200"), "window=-1"),
    ],
)
def test_refusals(
    model: Path, call: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    before = sorted(model.parent.rglob("*"))
    out = ("--out", model.parent) if arguments else ()
    text = () if "--text" in arguments else ("--text", model.parent / "prose.txt", "--tokens", "2000")
    code, shown, err = call("plan-kv", model, *arguments, *text, *out)
    assert code == 2 and shown == ""
    assert err.count("\n") == 1 and message in err
    assert sorted(model.parent.rglob("*")) == before


def test_a_budget_that_no_plan_meets(model: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call(
        "plan-kv",
        model,
        *SMALL,
        "--text",
        model.parent / "prose.txt",
        "--bits",
        "2.5",
        "--out",
        model.parent / "p",
        "--mixes",
        "0",
    )
    assert code == 2 and "no plan has 2.5 bits an element; the smallest has 3.000" in err
    assert not (model.parent / "p" / KV_PLAN_NAME).exists()


def planner(model: Any, **options: Any) -> KVPlanner:
    tokens = torch.randint(4, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    text = KVText({200: tokens}, "random", "f")
    return KVPlanner(model, text, **({"window": 8, "mixes": 0, "kl_tokens": 200, "sinks": 2} | options))


def test_layers_with_a_soft_cap_are_not_centered() -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    config = Gemma2Config(**sizes, num_hidden_layers=2, sliding_window=9, query_pre_attn_scalar=16)
    one = planner(Gemma2ForCausalLM(config).eval().requires_grad_(False))
    assert one.layers == [1]  # the other keeps a window
    assert set(one.measure("m").layers) == {1} and one.means == {}


def test_what_does_not_help_costs_as_much_as_it_does(model: Path) -> None:
    """A layer whose output is thrown away costs nothing, and gets the fewest bits."""
    net = LlamaForCausalLM.from_pretrained(model).eval().requires_grad_(False)
    net.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)
    one = planner(net)
    found = one.measure("m")
    assert found.layers[1].slope_k < 1e-3 * min(found.layers[0].slope_k, found.layers[2].slope_k)
    pairs = KVBudget(4.7).allocate(found.layers, one.exact).pairs
    assert pairs[1] == (2, 2) and min(sum(pairs[0]), sum(pairs[2])) > 4
    assert isinstance(net(input_ids=torch.ones(1, 4, dtype=torch.int64)).past_key_values, DynamicCache)


def test_widths_that_cannot_be_packed_are_refused() -> None:
    odd = LlamaForCausalLM(LlamaConfig(**(SIZES | {"head_dim": 12}))).eval()
    with pytest.raises(KVError, match="need a head_dim in steps of 8, not 12"):
        planner(odd).measure("m")


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2], [3, 4]) is None


def test_the_tokenizer_of_the_fixture_has_tokens(model: Path) -> None:
    assert max(load_tokenizer(open_source(str(model)))("plain text")["input_ids"]) < SIZES["vocab_size"]
