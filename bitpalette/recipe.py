"""From what a user asks for (bits, codec, solver, ...) to a plan, with defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .calibrate.plan import Plan, PlanError, Rule, parse_scheme
from .quant.codec import codec_names
from .quant.scheme import Scheme, SchemeError
from .quant.solver import plan_solver

DEFAULT_GROUP_SIZE = 64
DEFAULT_OUTER_BITS = 8
"""Head and embeddings: int8 with a scale a row, half the size; on small models they are a large part of the file."""


def scheme_for(codec: str, bits: int, group_size: int | None, asymmetric: bool = False) -> Scheme:
    """The scheme of `codec` at `bits` bits a weight. PlanError where they do not go together."""
    group = DEFAULT_GROUP_SIZE if group_size is None else group_size
    values: dict[str, Any]
    if codec == "int":
        values = {"codec": "int", "bits": bits, "group_size": group, "symmetric": not asymmetric}
    elif codec == "lut":
        if asymmetric:
            raise PlanError("--asymmetric is of codec int; a table has no zero point")
        values = {"codec": "lut", "entries": 1 << bits, "table": "lloyd", "group_size": group}
    else:
        raise PlanError(f"unknown codec {codec!r}; there are {codec_names()}")
    try:
        return Scheme.from_dict(values)
    except SchemeError as error:
        raise PlanError(f"--bits {bits} --codec {codec} --group-size {group}: {error}") from None


def outer_scheme(bits: int, group_size: int | None) -> Scheme | None:
    """Of embeddings and head: int8 a scale a row, fewer bits a scale a group; 16 keeps them."""
    if bits == 16:
        return None
    return scheme_for("int", bits, 0 if bits >= 8 else group_size)


def make_plan(
    *,
    bits: int = 4,
    codec: str = "int",
    solver: str = "gptq",
    group_size: int | None = None,
    asymmetric: bool = False,
    rotate: bool | None = None,
    head_bits: int | None = None,
    embed_bits: int | None = None,
    keep: Sequence[str] = (),
    set_: Sequence[str] = (),
    seed: int = 0,
    fold: bool = False,
) -> Plan:
    """The plan of `quantize run`. Raises PlanError.

    rotate: None is with solvers that feed errors back, where it pays (the README has a table). fold: the rotation of
    the residual stream goes into the weights beside it, where that is exact, instead of being computed while the model
    runs. It saves rotations and costs quality (figures in the README): the norms' gains, which damp the inputs'
    outliers, move into the weights that are rounded. bits: 16 keeps every weight.
    """
    for name, width in (("--bits", bits), ("--head-bits", head_bits), ("--embed-bits", embed_bits)):
        if width is not None and width != 16 and not 1 <= width <= 8:
            raise PlanError(f"{name} is 1 to 8, or 16 to keep the weights; got {width}")
    scheme = scheme_for(codec, bits if bits != 16 else 4, group_size, asymmetric)
    try:
        plan_solver(scheme, solver)
    except SchemeError as error:
        raise PlanError(f"--solver: {error}") from None
    linear = None
    if bits != 16:
        linear = scheme
        if rotate or (rotate is None and "gptq" in solver):
            linear = linear.replace(transforms=("rotate",))
    outer = DEFAULT_OUTER_BITS if bits != 16 else 16
    one = head_bits if head_bits is not None else embed_bits
    head = outer_scheme(head_bits if head_bits is not None else (one if one is not None else outer), group_size)
    embedding = outer_scheme(embed_bits if embed_bits is not None else (one if one is not None else outer), group_size)
    rules = [Rule(pattern, None) for pattern in keep]
    for text in set_:
        pattern, separator, value = text.partition("=")
        if not separator or not pattern:
            raise PlanError(f"--set {text!r} is not PATTERN=SCHEME, such as 'down_proj=bits=8' or 'lm_head=int,bits=6'")
        rules.append(Rule(pattern, parse_scheme(value, linear)))
    return Plan(linear, head, embedding, tuple(rules), solver, seed, fold)
