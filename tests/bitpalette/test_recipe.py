"""From options to a plan: the defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from bitpalette.calibrate.plan import Plan, PlanError
from bitpalette.quant.scheme import Scheme
from bitpalette.recipe import make_plan, outer_scheme, scheme_for


def int_scheme(**values: Any) -> Scheme:
    return Scheme.from_dict({"codec": "int", **values})


def trellis(rate: float, *transforms: str, window: int = 16) -> Scheme:
    return Scheme.from_dict({"codec": "trellis", "rate": rate, "window": window, "transforms": transforms})


def test_defaults() -> None:
    plan = make_plan()
    assert plan.linear == trellis(4, "rotate", "order")
    assert plan.head == plan.embedding == trellis(5, "rotate", "order")
    assert (plan.solver, plan.seed, plan.rules, plan.tune) == ("ldlq", 0, (), False)
    assert Plan.from_dict(plan.to_dict()) == plan
    plan = make_plan(codec="int")
    assert plan.linear == int_scheme(bits=4, group_size=64, transforms=["rotate"])
    assert plan.head == plan.embedding == int_scheme(bits=8, group_size=0)
    assert plan.solver == "gptq" and Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("options", "codec", "solver"),
    [
        ({"bits": 2.25}, "trellis", "ldlq"),
        ({"bits": 5}, "trellis", "ldlq"),
        ({"bits": 6}, "int", "gptq"),
        ({"bits": 3, "solver": "gptq"}, "int", "gptq"),
        ({"bits": 3.5, "solver": "rtn"}, "trellis", "rtn"),
        ({"group_size": 32}, "int", "gptq"),
        ({"asymmetric": True}, "int", "gptq"),
        ({"codec": "lut"}, "lut", "gptq"),
        ({"codec": "float"}, "float", "gptq"),
        ({"codec": "int", "solver": "ldlq"}, "int", "ldlq"),
    ],
)
def test_what_bits_and_solver_amount_to(options: dict[str, Any], codec: str, solver: str) -> None:
    plan = make_plan(**options)
    assert plan.linear is not None and (plan.linear.codec, plan.solver) == (codec, solver)


@pytest.mark.parametrize(
    ("preset", "bits", "solver", "scheme"),
    [
        ("trellis", 2.25, "ldlq", {"codec": "trellis", "rate": 2.25, "transforms": ["rotate", "order"]}),
        ("gptq", 3, "gptq", {"codec": "int", "bits": 3, "group_size": 64, "transforms": ["rotate"]}),
        ("awq", 4, "awq", {"codec": "int", "bits": 4, "group_size": 64}),
        ("nf4", 4, "rtn", {"codec": "lut", "table": "nf4", "group_size": 64}),
        ("mxfp4", 4, "rtn", {"codec": "float", "scale_format": "e8m0", "group_size": 32}),
        ("nvfp4", 4, "rtn", {"codec": "float", "scale_format": "e4m3", "group_size": 16}),
        ("higgs", 3, "rtn", {"codec": "lut", "entries": 64, "dims": 2, "transforms": ["rotate"]}),
        (
            "squeezellm",
            3,
            "squeezellm",
            {"codec": "lut", "entries": 8, "table": "kmeans", "table_scope": "row", "scaled": False},
        ),
    ],
)
def test_presets(preset: str, bits: float, solver: str, scheme: dict[str, Any]) -> None:
    plan = make_plan(preset=preset, bits=bits)
    assert (plan.linear, plan.solver) == (Scheme.from_dict(scheme), solver)


def test_efforts() -> None:
    fast, best = make_plan(bits=3, effort="fast"), make_plan(bits=3, effort="best")
    assert fast.linear == trellis(3, "rotate", "order", window=12) and not fast.tune
    assert fast.head == trellis(4, "rotate", "order", window=12)
    assert best.linear == trellis(3, "rotate", "order") and best.tune
    assert Plan.from_dict(best.to_dict()) == best


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ({"solver": "gptq"}, True),
        ({"solver": "rtn"}, False),
        ({"solver": "awq"}, False),
        ({"solver": "awq+gptq"}, True),
        ({"solver": "rtn", "rotate": True}, True),
        ({"codec": "int", "rotate": False}, False),
    ],
)
def test_rotation(options: dict[str, Any], rotated: bool) -> None:
    linear = make_plan(**options).linear
    assert linear is not None and linear.transforms == (("rotate",) if rotated else ())


def test_options_of_the_scheme() -> None:
    assert scheme_for("int", 3, None) == int_scheme(bits=3, group_size=64)
    assert scheme_for("int", 3, 0) == int_scheme(bits=3, group_size=0)
    assert scheme_for("int", 2, 32, asymmetric=True) == int_scheme(bits=2, group_size=32, symmetric=False)
    table = scheme_for("lut", 3, 32).to_dict()
    assert (table["codec"], table["entries"], table["group_size"]) == ("lut", 8, 32)
    for bits, element in ((4, "e2m1"), (6, "e2m3"), (8, "e4m3")):
        assert scheme_for("float", bits, 0) == Scheme.from_dict({"codec": "float", "element": element})


@pytest.mark.parametrize(
    ("head", "embed", "want"),
    [
        (None, None, (8, 8)),
        (16, None, (16, 16)),  # one of them alone speaks for both: they are often one tensor
        (None, 6, (6, 6)),
        (4, 16, (4, 16)),
        (8, 3, (8, 3)),
    ],
)
def test_head_and_embeddings(head: int | None, embed: int | None, want: tuple[int, int]) -> None:
    plan = make_plan(codec="int", head_bits=head, embed_bits=embed)
    assert (plan.head, plan.embedding) == (outer_scheme(want[0], None), outer_scheme(want[1], None))


def test_outer_schemes() -> None:
    assert outer_scheme(16, 32) is None
    assert outer_scheme(8, 32) == int_scheme(bits=8, group_size=0)  # a scale a row is enough
    assert outer_scheme(6, 32) == int_scheme(bits=6, group_size=32)
    assert outer_scheme(6, None) == int_scheme(bits=6, group_size=64)
    assert outer_scheme(3.5, None) == outer_scheme(3.5, None, "trellis") == trellis(3.5, "rotate", "order")
    assert outer_scheme(4, None) == int_scheme(bits=4, group_size=64)
    assert outer_scheme(4, None, "trellis", 12) == trellis(4, "rotate", "order", window=12)
    assert outer_scheme(6, None, "trellis") == int_scheme(bits=6, group_size=64)


def test_sixteen_bits_keep_everything() -> None:
    plan = make_plan(bits=16)
    assert (plan.linear, plan.head, plan.embedding) == (None, None, None)
    assert make_plan(bits=16, head_bits=8).head == int_scheme(bits=8)


def test_rules_in_order() -> None:
    plan = make_plan(
        bits=4,
        codec="int",
        rotate=False,
        keep=["lm_head"],
        set_=["down_proj=bits=8", 'q_proj={"codec": "int", "bits": 2}', "layers.0.*=keep", "re:up=lut,entries=16"],
    )
    assert [rule.pattern for rule in plan.rules] == ["lm_head", "down_proj", "q_proj", "layers.0.*", "re:up"]
    assert [rule.scheme for rule in plan.rules[:4]] == [
        None,
        int_scheme(bits=8, group_size=64),
        int_scheme(bits=2),
        None,
    ]
    assert plan.rules[4].scheme == Scheme.from_dict({"codec": "lut", "entries": 16})


@pytest.mark.parametrize("bits", [0, 9, -3, 15, 17, 10**12])
@pytest.mark.parametrize("name", ["bits", "head_bits", "embed_bits"])
def test_bits_that_make_no_sense(name: str, bits: int) -> None:
    with pytest.raises(PlanError, match=rf"--{name.replace('_', '-')} is 1 to 8, or 16 .*; got {bits}$"):
        make_plan(**{name: bits})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "nonsuch"}, "unknown codec 'nonsuch'; there are"),
        ({"codec": "nonsuch", "bits": 16}, "unknown codec 'nonsuch'; there are"),
        ({"codec": "lut", "bits": 1}, "--bits 1 --codec lut"),
        ({"codec": "float", "bits": 5}, r"--bits 5 --codec float: it has \[4, 6, 8\] bits"),
        ({"codec": "float", "bits": 4.5}, "--bits 4.5 --codec float"),
        ({"codec": "float", "asymmetric": True}, "--asymmetric is of codec int"),
        ({"preset": "mxfp4", "group_size": 64}, "group_size 32; got 64"),
        ({"codec": "lut", "asymmetric": True}, "--asymmetric is of codec int"),
        ({"group_size": 3}, "--bits 4 --codec int --group-size 3: group_size is .* at least 8"),
        ({"group_size": -64}, "got -64"),
        ({"solver": "nonsuch"}, "--solver: unknown solver 'nonsuch'"),
        ({"solver": "nonsuch", "bits": 16}, "--solver: unknown solver 'nonsuch'"),
        ({"solver": "gptq+awq"}, "--solver: solver 'gptq\\+awq'"),
        ({"solver": ""}, "--solver"),
        ({"set_": ["down_proj"]}, "--set 'down_proj' is not PATTERN=SCHEME"),
        ({"set_": ["=keep"]}, "--set '=keep' is not PATTERN=SCHEME"),
        ({"set_": ["x=nonsuch,bits=3"]}, "'nonsuch,bits=3' is no scheme: .*nonsuch"),
        ({"set_": ["x=int,colour=3"]}, "no parameter 'colour'"),
        ({"set_": ["x=int,bits"]}, "'bits' is not key=value"),
        ({"set_": ["x=bits=3"], "bits": 16}, "'bits=3' is no scheme"),
        ({"set_": ["x={"]}, "'{' is no scheme"),
        ({"set_": ['x={"codec": "int", "bits": "4"}']}, "bits is a whole number, 1 to 8; got '4'"),
        ({"set_": ['x={"codec": "int", "bits": true}']}, "got True"),
        ({"set_": ["x=int,bits=4.5"]}, "got 4.5"),
        ({"set_": ["x=int,symmetric=no"]}, "symmetric is true or false; got 'no'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make_plan(**options)
    assert "\n" not in str(caught.value)
