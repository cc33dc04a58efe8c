"""From options to a plan: the defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from bitpalette.calibrate.plan import Plan, PlanError
from bitpalette.quant.scheme import Scheme
from bitpalette.recipe import make_plan, outer_scheme, scheme_for


def int_scheme(**values: Any) -> Scheme:
    return Scheme.from_dict({"codec": "int", **values})


def test_defaults() -> None:
    plan = make_plan()
    assert plan.linear == int_scheme(bits=4, group_size=64, transforms=["rotate"])
    assert plan.head == plan.embedding == int_scheme(bits=8, group_size=0)
    assert (plan.solver, plan.seed, plan.rules) == ("gptq", 0, ())
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ({}, True),
        ({"solver": "rtn"}, False),
        ({"solver": "awq"}, False),
        ({"solver": "awq+gptq"}, True),
        ({"solver": "rtn", "rotate": True}, True),
        ({"rotate": False}, False),
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
    plan = make_plan(head_bits=head, embed_bits=embed)
    assert (plan.head, plan.embedding) == (outer_scheme(want[0], None), outer_scheme(want[1], None))


def test_outer_schemes() -> None:
    assert outer_scheme(16, 32) is None
    assert outer_scheme(8, 32) == int_scheme(bits=8, group_size=0)  # a scale a row is enough
    assert outer_scheme(6, 32) == int_scheme(bits=6, group_size=32)
    assert outer_scheme(6, None) == int_scheme(bits=6, group_size=64)


def test_sixteen_bits_keep_everything() -> None:
    plan = make_plan(bits=16)
    assert (plan.linear, plan.head, plan.embedding) == (None, None, None)
    assert make_plan(bits=16, head_bits=8).head == int_scheme(bits=8)


def test_rules_in_order() -> None:
    plan = make_plan(
        bits=4,
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
