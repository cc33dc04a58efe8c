"""`quantize plan`, `quantize pareto` and `quantize run --plan`, from a tiny model to a measured checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitpalette
from bitpalette.calibrate.evaluate import evaluate
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.text import Calibration, held_out_sequences
from bitpalette.calibrate.whole import load_model, load_tokenizer
from bitpalette.cli import main
from bitpalette.formats.base import open_source
from bitpalette.formats.kv_plan_file import KVCalibration, LayerSensitivity, StoredKVPlan, read_kv_plan
from bitpalette.formats.manifest import is_complete
from bitpalette.formats.plan_file import PLAN_NAME, StoredPlan, read_plan
from bitpalette.kernel_bench.rounds import Spread
from bitpalette.kv_use import plan_of
from bitpalette.palette import outer_palette, palette
from bitpalette.plan_budget import Budget
from bitpalette.plan_refine import Refinement
from bitpalette.plan_telling import stored_plan
from bitpalette.planning import Planner
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.kv_plan import KVPlan
from bitpalette.quant.tensor import stored_bytes
from bitpalette.recipe import make_plan

PROSE = " ".join(
    f"{n} times {n + 1} is {n * (n + 1)}, and {n} less {7 * n % 11} is {n - 7 * n % 11}." for n in range(260)
)
SEQ_LEN = 64
TOKENS = 64 * SEQ_LEN
SIZES: dict[str, Any] = {
    "vocab_size": 110,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "initializer_range": 0.12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MENU = ["trellis=1.5/2/2.5/3/3.5/4/5"]


@pytest.fixture
def model(tmp_path: Path, checkpoint: Callable[..., Path]) -> Path:
    """A llama with the tiny tokenizer of the other tests; one layer matters far more than the others."""
    folder = checkpoint("llama")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(4)
        llama.model.layers[1].self_attn.q_proj.weight.mul_(0.05)
    llama.save_pretrained(folder)
    (tmp_path / "prose.txt").write_text(PROSE)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
        code = main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def planner(model: Path, tmp_path: Path) -> Callable[..., Planner]:
    """planner(serve=.., **options of make_plan), measured."""

    def make(serve: str | None = None, menu: list[str] | None = None, **options: Any) -> Planner:
        template = make_plan(**{"bits": 4, "effort": "fast", "head_bits": 16, "embed_bits": 16} | options)
        calibration = Calibration(str(tmp_path / "prose.txt"), TOKENS, SEQ_LEN)
        made = Planner(
            open_source(str(model)),
            template,
            palette(menu or MENU, "fast"),
            [],
            calibration,
            tmp_path / "stats",
            serve=serve,
            sensitivity_tokens=1024,
            refine_tokens=512,
        )
        made.measure()
        return made

    return make


def options(tmp_path: Path) -> list[object]:
    text = ("--calib", tmp_path / "prose.txt", "--calib-tokens", TOKENS, "--seq-len", SEQ_LEN)
    return [*text, "--sensitivity-tokens", 1024, "--effort", "fast", "--stats", tmp_path / "stats"]


def average(made: Planner, plan: Any) -> float:
    schemes = made.compiled(plan).schemes
    weights = {n: made.weights[n].shape for n in schemes}
    total = sum(stored_bytes(s, weights[n]) for n, s in schemes.items())
    return 8 * total / sum(a * b for a, b in weights.values())


def test_what_matters_gets_more(planner: Callable[..., Planner]) -> None:
    made = planner()
    solved = made.solve(Budget(bits=3.2))
    plan, chosen = solved.plan, solved.chosen
    schemes = made.compiled(plan).schemes
    rate = {n: s.rate for n, s in schemes.items()}  # type: ignore[attr-defined]
    assert 3.0 <= average(made, plan) <= 3.2 and chosen.exact
    assert rate["model.layers.0.mlp.down_proj.weight"] > rate["model.layers.1.self_attn.q_proj.weight"]
    uniform = sum(made.cost(n, next(s for s in menu if s.rate == 3.0)) for n, menu in made.candidates.items())
    assert chosen.cost < 0.9 * uniform
    costs = [made.solve(Budget(bits=b)).chosen.cost for b in (2.0, 2.5, 3.0, 4.0)]
    assert costs == sorted(costs, reverse=True)


def test_predicted_is_what_is_measured(planner: Callable[..., Planner]) -> None:
    """Before any refinement, where errors are small enough for the second order to hold."""
    made = planner()
    for bits in (3.5, 4.5):
        (point,) = Refinement(made).front([Budget(bits=bits)])
        assert abs(point["predicted"] / point["measured"] - 1) <= 0.35


def test_refining(planner: Callable[..., Planner]) -> None:
    made = planner()
    budget = Budget(bits=2.5)
    refinement = Refinement(made)
    solved, rounds = refinement.refine(budget, 2)
    assert len(rounds) == 2 and all(r.bought >= 0 for r in rounds)
    assert average(made, solved.plan) <= 2.5
    assert all(abs(r.predicted / r.measured - 1) <= 0.35 for r in rounds)
    stored = stored_plan(made, solved, budget, rounds)
    assert stored.predicted.perplexity is not None and stored.predicted.reference_perplexity is not None
    (measured,) = refinement.measured([refinement.quick(solved)])
    assert abs(stored.predicted.perplexity / measured.perplexity - 1) <= 0.01
    assert abs(stored.predicted.kl / measured.kl - 1) <= 0.02
    assert measured.kl <= rounds[0].measured - rounds[0].bought - rounds[1].bought + 1e-9


def test_refining_finds_a_wrong_price(planner: Callable[..., Planner]) -> None:
    """One kind made thrice as dear as it is: the plan gets better by measuring, and its price comes down."""
    made = planner()
    made.factors = {"up_proj": 3.0}
    _, (told,) = Refinement(made).refine(Budget(bits=2.5), 1)
    assert told.bought > 0.03 * told.measured and made.factors["up_proj"] < 2.2


def test_a_second_plan_measures_nothing(planner: Callable[..., Planner], monkeypatch: pytest.MonkeyPatch) -> None:
    first = planner().solve(Budget(bits=3)).plan

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("collect_statistics", "fisher_sensitivities", "expected_errors"):
        monkeypatch.setattr(f"bitpalette.planning.{name}", never)
    assert planner().solve(Budget(bits=3)).plan == first


def test_sizes_of_files_are_met(planner: Callable[..., Planner]) -> None:
    made = planner(head_bits=None, embed_bits=None)
    made.outer = outer_palette(["trellis=2/3/4/5"], "fast")
    made.candidates = {n: made._candidates(n) for n in made.compilation.schemes}
    made.errors = made._errors()
    most = made.compiled(made.solve(Budget(bits=5)).plan).sizes().file_bytes
    for size in (most - 2000, most - 5000):
        solved = made.solve(Budget(size_bytes=size))
        assert size - 2500 <= made.compiled(solved.plan).sizes().file_bytes <= size
    with pytest.raises(PlanError, match=r"for size is short by [\d,]+ bytes: the smallest possible is [\d,]+ bytes"):
        made.solve(Budget(size_bytes=20_000))
    with pytest.raises(PlanError, match="short by"):
        made.solve(Budget(bits=1.2))


def test_two_budgets_at_once(planner: Callable[..., Planner]) -> None:
    made = planner()
    size = made.compiled(made.solve(Budget(bits=3)).plan).sizes().file_bytes
    solved = made.solve(Budget(bits=4, size_bytes=size))
    assert made.compiled(solved.plan).sizes().file_bytes <= size and solved.chosen.exact
    assert solved.chosen.cost <= made.solve(Budget(bits=3)).chosen.cost + 1e-9


def test_fused_weights_share_a_scheme(planner: Callable[..., Planner]) -> None:
    made = planner(serve="vllm")
    shared = made.solve(Budget(bits=2.7))
    schemes = made.compiled(shared.plan).schemes
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        assert len({schemes[f"{attention}{n}_proj.weight"] for n in "qkv"}) == 1
        assert len({schemes[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")}) == 1
    made.serve = None
    assert made.solve(Budget(bits=2.7)).chosen.cost <= shared.chosen.cost + 1e-12
    with pytest.raises(PlanError, match="there is vllm"):
        planner(serve="tgi")


def test_kept_and_set(planner: Callable[..., Planner]) -> None:
    made = planner(keep=["layers.0.self_attn.*"], set_=["layers.1.mlp.*=int,bits=8,group_size=0"])
    schemes = made.compiled(made.solve(Budget(bits=6)).plan).schemes
    assert not any("layers.0.self_attn" in n for n in schemes)
    assert all(s.codec == "int" for n, s in schemes.items() if "layers.1.mlp" in n)
    assert sum("layers.1.mlp" in n for n in schemes) == 3
    with pytest.raises(PlanError, match="nothing is left to plan"):
        planner(keep=["*"])


def test_command_to_checkpoint(
    model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    code, told, err = call("plan", model, "--bits", 3, "--out", plan, *options(tmp_path), "--palette", MENU[0])
    assert code == 0, err
    assert "down_proj" in told and "KL" in told and "quantize run MODEL OUT --plan" in told
    stored = read_plan(plan)
    assert stored.command.startswith("quantize plan") and stored.budget.bits == 3 and len(stored.rounds) == 1
    assert abs(sum(w.predicted for w in stored.weights.values()) - stored.predicted.kl) <= 1e-9
    assert stored.bits_per_weight <= 3
    text = options(tmp_path)[:6]
    code, told, err = call("run", model, out, "--plan", plan, *text, "--stats", tmp_path / "stats", "--json")
    assert code == 0 and json.loads(told)["bits_per_weight"] == pytest.approx(stored.bits_per_weight, abs=1e-5), err
    assert is_complete(out)
    kept = read_plan(out / PLAN_NAME)
    assert kept.measured is not None
    # the same by whole models, one of them loaded from the files
    calibration = Calibration(str(tmp_path / "prose.txt"), TOKENS, SEQ_LEN)
    tokens = held_out_sequences(calibration, load_tokenizer(open_source(str(model))), 4096 // SEQ_LEN)
    monkeypatch.setenv("BITPALETTE_KERNEL", "reference")
    loaded = bitpalette.load(out, dtype=torch.float32)
    want = evaluate(loaded, tokens, load_model(open_source(str(model)), torch.float32))
    assert kept.measured.tokens == tokens.numel() and abs(kept.measured.kl / want.kl_divergence - 1) <= 1e-3
    assert abs(kept.measured.perplexity / want.perplexity - 1) <= 1e-3
    assert kept.model_copy(update={"measured": None}) == stored
    assert abs(kept.measured.kl / kept.predicted.kl - 1) <= 0.5
    assert {k: w.scheme for k, w in kept.weights.items()} == {
        r["parameter"]: r["scheme"] for r in json.loads((out / "quantization_report.json").read_text())["layers"]
    }


def test_bits_alone_are_planned(model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    out, stats = tmp_path / "out", tmp_path / "out.plan"
    text = [*options(tmp_path)[:6], "--effort", "fast", "--head-bits", 16]
    run = ("run", model, out, "--bits", 3.3, *text)
    code, told, err = call(*run)
    assert code == 0 and "measured" in told and "predicted" in told, err
    kept = read_plan(out / PLAN_NAME)
    assert (
        kept.measured is not None and kept.bits_per_weight <= 3.3 and len({w.scheme for w in kept.weights.values()}) > 1
    )
    assert is_complete(out) and not stats.exists()
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    code, told, err = call(*run)  # again: nothing is planned or written anew
    assert code == 0 and "is complete already" in err and not stats.exists()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    # of a method, bits are everybody's
    code, told, _ = call("run", model, tmp_path / "same", "--bits", 3, "--uniform", *text, "--json")
    assert code == 0 and {r["scheme"].split(" +")[0] for r in json.loads(told)["layers"]} == {
        "trellis rate=3.0 window=12"
    }
    for given, message in [
        (("--size", "1MB", "--codec", "int"), "--size is met by a plan, --codec codes every layer alike"),
        (("--tokens-per-second", 3, "--uniform"), "--tokens-per-second is met by a plan, --uniform codes"),
        (("--palette", "int"), "--palette is of plans"),
        (("--bits", 1.2), "budget of 1.2 bits a weight for bits is short by"),
        (("--size", "10kB"), "bytes for size is short by"),
        (("--bits", 3, "--dry-run"), "--dry-run does not plan"),
    ]:
        code, _, err = call("run", model, tmp_path / "no", *given, *text)
        assert code == 2 and message in err and not list(tmp_path.glob("no*"))


def test_memory_from_command_to_a_packed_cache(
    model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitpalette.plan_memory.base_bytes", lambda packed: 1_000_000)
    monkeypatch.setattr("bitpalette.commands.plan.CACHE_TOKENS", 512)
    monkeypatch.setattr("bitpalette.commands.plan.CACHE_MIXES", 0)
    out, text = tmp_path / "out", [*options(tmp_path)[:6], "--effort", "fast", "--head-bits", 16, "--refine", 0]
    code, _, err = call("run", model, out, "--memory", "1kB", "--context", 250, *text, "--stats", tmp_path / "stats")
    assert code == 2 and "for memory is short by" in err and not out.exists()
    least = int(err.rpartition("possible is ")[2].split()[0].replace(",", ""))
    memory = ("--memory", str(least + 20_000), "--context", 250)
    code, _, err = call("run", model, out, *memory, *text, "--stats", tmp_path / "stats")
    assert code == 0 and is_complete(out), err
    kept, cache = read_plan(out / PLAN_NAME), read_kv_plan(out)
    assert kept.cache is not None and cache is not None and kept.bytes.memory is not None
    assert kept.bytes.memory <= least + 20_000
    for layer, planned in kept.cache.items():
        form = cache.plan.format_of(layer)
        assert planned.format == f"k{form.bits_k}v{form.bits_v}"
    assert plan_of(bitpalette.load(out)) is not None
    # a plan for weights and cache needs the folder with the means of keys
    code, _, err = call("run", model, tmp_path / "other", "--plan", out / PLAN_NAME, *text[:6])
    assert code == 2 and "--stats names the one" in err and not (tmp_path / "other").exists()


def test_a_result_that_is_worse_than_asked_is_none(
    model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert call("plan", model, "--bits", 2, "--out", plan, "--refine", 0, *options(tmp_path))[0] == 0
    run = ("run", model, out, "--plan", plan, *options(tmp_path)[:6])
    code, _, err = call(*run, "--verify-kl", 1e-6)
    assert code == 2 and "is more than --verify-kl 1e-06" in err and not is_complete(out)


def test_several_budgets_from_one_calibration(
    model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "pareto.json"
    code, told, err = call("pareto", model, "--bits", "2,3,4", "--out", out, *options(tmp_path), "--json")
    assert code == 0, err
    points = json.loads(told)
    assert points == json.loads(out.read_text()) and len(points) == 3
    assert [round(p["bits"]) for p in points] == [2, 3, 4]
    assert points[0]["measured"] > points[1]["measured"] > points[2]["measured"] > 0


@pytest.fixture
def measured_cache(model: Path, tmp_path: Path) -> StoredKVPlan:
    """A cache that hardly matters at 4 bits, and at 2 costs the more the later the layer."""
    names = {"k16v4": 1e-4, "k4v16": 1e-4, "k4v4": 2e-4, "k2v2": 2e-2, "k2v16": 1e-2, "k16v2": 1e-2}
    layers = {
        n: LayerSensitivity(
            kv_heads=2, head_dim=16, head_dim_v=16, slope_k=n + 1.0, slope_v=n + 1.0, errors={64: dict(names)}
        )
        for n in range(2)
    }
    calibration = KVCalibration(model="m", text="t", text_name="t", tokens=1, lengths=[64], layers=layers)
    means = {n: torch.zeros(2, 16) for n in range(2)}
    return StoredKVPlan(KVPlan(KVFormat(sinks=4, window=16), {}, means), calibration)


def test_weights_and_cache_share_memory(
    planner: Callable[..., Planner], measured_cache: StoredKVPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitpalette.plan_memory.base_bytes", lambda packed: 1_000_000)
    made = planner(menu=["trellis=2/3/4"])
    made.cache = measured_cache

    def asked(memory: int, context: int = 200) -> Budget:
        return Budget(memory_bytes=memory, context=context, batch=4)

    with pytest.raises(
        PlanError, match=r"for memory is short by [\d,]+ bytes: the smallest possible is [\d,]+ bytes"
    ) as e:
        made.solve(asked(1_000_000))
    least = int(str(e.value).rpartition("possible is ")[2].split()[0].replace(",", ""))
    tight = made.solve(asked(least))
    assert tight.memory is not None and tight.memory.total == pytest.approx(least, rel=1e-3)
    roomy = made.solve(asked(least + 60_000))
    assert roomy.memory is not None and least < roomy.memory.total <= (least + 60_000) * 1.001
    assert roomy.chosen.cost < tight.chosen.cost
    assert tight.cache == {0: (2, 2), 1: (2, 2)} and roomy.cache is not None
    # with a far longer context the cache is what has to shrink, with one token it is not worth a bit
    assert {bits for pair in made.solve(asked(least + 60_000, 20)).cache.values() for bits in pair} == {16}  # type: ignore[union-attr]
    stored = stored_plan(made, roomy, asked(least + 60_000))
    assert stored.cache is not None and stored.bytes.memory == roomy.memory.total
    assert stored.bytes.cache == roomy.memory.cache
    assert set(stored.contexts) == {"4GB", "6GB", "8GB", "12GB", "16GB", "24GB"} and set(stored.contexts.values()) == {
        256
    }
    assert abs(stored.predicted.kl - roomy.chosen.cost) <= 1e-9
    with pytest.raises(PlanError, match="has 256 positions"):
        made.solve(asked(10**9, 1000))
    made.cache = None
    with pytest.raises(PlanError, match="were not measured"):
        made.solve(asked(10**9))


def test_tokens_per_second(planner: Callable[..., Planner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With times that are proportional to bits."""
    monkeypatch.setenv("BITPALETTE_CACHE", str(tmp_path / "cache"))

    def times(schemes: Sequence[Any], shape: tuple[int, int], threads: int, read: int) -> list[Spread]:
        taken = [shape[0] * shape[1] * (16 if s is None else s.rate) * 1e-9 for s in schemes]
        return [Spread(t, t, t) for t in taken]

    def rest(config: Any, schemes: Any, threads: int) -> Spread:
        return Spread(2e-3, 2e-3, 2e-3)

    monkeypatch.setattr("bitpalette.plan_latency.layer_times", times)
    monkeypatch.setattr("bitpalette.plan_latency.rest_of_step", rest)
    made = planner()
    slow = made.solve(Budget(bits=5.5, tokens_per_second=100, threads=1))
    assert slow.tokens_per_second is not None and slow.tokens_per_second >= 100
    wish = 1 / (0.9 / slow.tokens_per_second)
    quick = made.solve(Budget(tokens_per_second=wish, threads=1))
    assert quick.tokens_per_second is not None and wish <= quick.tokens_per_second <= wish * 1.1
    assert quick.chosen.cost > slow.chosen.cost
    with pytest.raises(PlanError, match=r"for seconds is short by .* seconds a token"):
        made.solve(Budget(tokens_per_second=1e6, threads=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a plan needs a budget"),
        (("--bits", 0.5), "an average of 1 to 8"),
        (("--size", "much"), "is no size such as 90MB"),
        (("--memory", "1GB"), "give both"),
        (("--bits", 3, "--context", 100), "give both"),
        (("--memory", "1GB", "--context", 0), "are numbers of 1 or more"),
        (("--tokens-per-second", 0), "a number above 0"),
        (("--bits", 3, "--palette", "gguf"), "codecs are"),
        (("--bits", 3, "--palette", "int=x"), "are no bits such as"),
        (("--bits", 3, "--serve", "tgi"), "there is vllm"),
        (("--bits", 3, "--out", "."), "is a folder"),
        (("--bits", 3, "--out", "nowhere/plan.json"), "there is no such folder"),
    ],
)
def test_bad_input(
    arguments: tuple[object, ...],
    message: str,
    model: Path,
    tmp_path: Path,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call("plan", model, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "quantization_plan.json").exists()


def test_plans_that_are_none(model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert call("plan", model, "--bits", 3, "--out", plan, "--refine", 0, *options(tmp_path))[0] == 0

    def refused(*arguments: object) -> str:
        code, _, err = call("run", model, out, *arguments)
        assert code == 2 and err.count("\n") == 1 and not out.exists()
        return err

    assert "cannot be read" in refused("--plan", tmp_path / "none.json")
    assert "says what --bits would" in refused("--plan", plan, "--bits", 3)
    assert "nats a token above 0, with a plan" in refused("--verify-kl", 0.1)
    values = json.loads(plan.read_text())
    plan.write_text(json.dumps(values | {"format_version": 9}))
    assert "written by a newer bitpalette" in refused("--plan", plan)
    plan.write_text(json.dumps(values | {"bits_per_weight": "many"}))
    assert "bits_per_weight" in refused("--plan", plan)
    plan.write_text(json.dumps(values | {"model": "another"}))
    assert "was made for another model" in refused("--plan", plan)
    plan.write_text(json.dumps(values)[:-30])
    assert "is no JSON" in refused("--plan", plan)
    assert StoredPlan.model_validate(values).rounds == []
