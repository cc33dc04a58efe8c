"""Rules and plans: what a pattern matches, which rule wins, what is refused; plans and schemes as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitpalette.calibrate.plan import Plan, PlanError, Rule, parse_scheme
from bitpalette.calibrate.structure import Weight, quantizable
from bitpalette.quant.scheme import Scheme

A = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 16})
B = Scheme.from_dict({"codec": "int", "bits": 8})
C = Scheme.from_dict({"codec": "int", "bits": 2, "transforms": ["rotate"]})


@pytest.mark.parametrize(
    ("pattern", "parameter", "matches"),
    [
        ("down_proj", "model.layers.0.mlp.down_proj.weight", True),
        ("down_proj.weight", "model.layers.0.mlp.down_proj.weight", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj.weight", True),
        ("wn_proj", "model.layers.0.mlp.down_proj.weight", False),
        ("*wn_proj", "model.layers.0.mlp.down_proj.weight", True),
        ("down", "model.layers.0.mlp.down_proj.weight", False),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight", True),
        ("layers.0.*", "model.layers.0.mlp.down_proj.weight", True),
        ("layers.1.*", "model.layers.10.mlp.down_proj.weight", False),
        ("layers.1?.*", "model.layers.10.mlp.down_proj.weight", True),
        ("layers.[0-3].*", "model.layers.2.mlp.down_proj.weight", True),
        ("Down_Proj", "model.layers.0.mlp.down_proj.weight", False),
        ("re:down|up", "model.layers.0.mlp.up_proj.weight", True),
        (r"re:layers\.\d\.", "model.layers.10.mlp.up_proj.weight", False),
        ("re:^mlp", "model.layers.0.mlp.up_proj.weight", False),
        ("experts", "model.layers.0.mlp.experts.down_proj", True),
        ("experts.down_proj", "model.layers.0.mlp.experts.down_proj", True),
        ("*", "lm_head.weight", True),
        ("", "lm_head.weight", False),
    ],
)
def test_patterns(pattern: str, parameter: str, matches: bool) -> None:
    assert Rule(pattern, None).matches(parameter) == matches


def resolve(plan: Plan, model: Any, **options: Any) -> dict[str, Scheme | None]:
    weights = quantizable(model)
    return plan.resolve(weights, [k for k in weights if ".layers." in k or ".h." in k], **options)


def test_places(families: Any) -> None:
    chosen = resolve(Plan(A, B, C), families["llama"]())
    assert chosen.pop("model.embed_tokens.weight") == C
    assert chosen.pop("lm_head.weight") == B
    assert len(chosen) == 14 and set(chosen.values()) == {A}
    assert set(resolve(Plan(None), families["llama"]()).values()) == {None}


def test_routers_are_kept(families: Any) -> None:
    from torch import nn

    block = nn.Module()
    block.router = nn.Linear(16, 6, bias=False)
    block.experts = nn.Module()
    block.experts.gate_up_proj = nn.Parameter(nn.Linear(16, 6 * 32).weight.view(6, 32, 16).detach())
    block.experts.down_proj = nn.Parameter(nn.Linear(16, 6 * 16).weight.view(6, 16, 16).detach())
    weights = quantizable(nn.ModuleList([block]))
    chosen = Plan(A).resolve(weights, weights)
    assert chosen == {"0.router.weight": None, "0.experts.gate_up_proj": A, "0.experts.down_proj": A}
    assert Plan(A, rules=(Rule("router", B),)).resolve(weights, weights)["0.router.weight"] == B


def test_the_last_rule_wins(families: Any) -> None:
    rules = (Rule("layers.0.*", B), Rule("down_proj", None), Rule("layers.0.mlp.down_proj", C), Rule("lm_head", A))
    chosen = resolve(Plan(A, rules=rules), families["llama"]())
    assert chosen["model.layers.0.self_attn.q_proj.weight"] == B
    assert chosen["model.layers.0.mlp.down_proj.weight"] == C
    assert chosen["model.layers.1.mlp.down_proj.weight"] is None
    assert chosen["model.layers.1.mlp.up_proj.weight"] == A
    assert chosen["lm_head.weight"] == A and chosen["model.embed_tokens.weight"] is None


def test_tied_weights(families: Any) -> None:
    model = families["qwen2"]()
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(PlanError, match="one tensor \\(tied\\); give --head-bits and --embed-bits the same value"):
        resolve(Plan(A, B, C), model, tied=tied)
    for pattern in ("lm_head", "embed_tokens"):
        assert resolve(Plan(A, B, C, (Rule(pattern, A),)), model, tied=tied)["model.embed_tokens.weight"] == A
    chosen = resolve(Plan(A, B, B), model, tied=tied)
    assert chosen["model.embed_tokens.weight"] == B and "lm_head.weight" not in chosen
    resolve(Plan(A, B, C), families["llama"]())  # two tensors: two schemes


def test_what_can_only_be_kept(families: Any) -> None:
    model, odd = families["llama"](), ["model.layers.0.odd"]
    chosen = resolve(Plan(A, rules=(Rule("odd", None),)), model, only_kept=odd)
    assert "model.layers.0.odd" not in chosen and len(chosen) == 16
    with pytest.raises(PlanError, match=r"matches model.layers.0.odd, which can only be kept"):
        resolve(Plan(A, rules=(Rule("odd", A),)), model, only_kept=odd)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(A, rules=(Rule("nothing", None),)), "'nothing' matches none of 16 weights \\(one is model.embed_tokens"),
        (Plan(A, rules=(Rule("re:(", None),)), "no regular expression"),
        (Plan(A.replace(group_size=73)), "q_proj.weight: group_size 73 is wider .*; give it another scheme"),
    ],
)
def test_errors(families: Any, plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(plan, families["llama"]())


def test_experts_are_checked_by_their_matrices() -> None:
    weights = {"e.down_proj": Weight("experts", "e", (4, 100, 20))}
    with pytest.raises(PlanError, match="20 columns"):
        Plan(A.replace(group_size=24)).resolve(weights, weights)
    assert Plan(A).resolve(weights, weights) == {"e.down_proj": A}


def test_as_json() -> None:
    plan = Plan(C, None, B, (Rule("x", None), Rule("re:y", A)), "awq+gptq", 7)
    values = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(values) == plan and Plan.from_dict(values).to_dict() == values
    assert Plan.from_dict({"linear": {"codec": "int", "bits": 8}}) == Plan(B)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"linear": None},
        {"linear": {"codec": "nonsuch"}},
        {"linear": {"codec": "int", "bits": 9}},
        {"linear": "keep", "rules": [["x"]]},
        {"linear": "keep", "rules": 5},
        {"linear": "keep", "rules": [[5, "keep"]]},
        {"linear": "keep", "solver": 5},
        {"linear": "keep", "seed": "x"},
        [],
        "keep",
    ],
)
def test_no_plan(values: Any) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_dict(values)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("keep", None),
        ("16", None),
        ("bits=3", {"codec": "int", "bits": 3, "group_size": 16}),
        ("int,bits=3", {"codec": "int", "bits": 3}),
        (" int , bits=3 , symmetric=false ", {"codec": "int", "bits": 3, "symmetric": False}),
        ('{"codec": "int", "transforms": ["rotate"]}', {"codec": "int", "transforms": ["rotate"]}),
        ("group_size=0", {"codec": "int", "bits": 4}),
    ],
)
def test_schemes_as_text(text: str, want: dict[str, Any] | None) -> None:
    assert parse_scheme(text, A) == (None if want is None else Scheme.from_dict(want))


@pytest.mark.parametrize(
    "text", ["", "bits", "bits=", "int,=3", "nonsuch", "int,bits=4,colour=1", "{}", "{", "bits=1.2.3"]
)
def test_no_scheme(text: str) -> None:
    with pytest.raises(PlanError, match="is no scheme") as caught:
        parse_scheme(text, None if text == "" else A)
    assert "\n" not in str(caught.value)
