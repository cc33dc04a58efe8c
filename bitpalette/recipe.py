"""From what a user asks for (bits, a preset, codec, solver, effort, ...) to a plan, with defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .calibrate.plan import Plan, PlanError, Rule, parse_scheme
from .quant.codec import codec_names
from .quant.scheme import Scheme, SchemeError
from .quant.solver import plan_solver

DEFAULT_BITS = 4.0
DEFAULT_GROUP_SIZE = 64
MOST_TRELLIS_BITS = 5.0
OUTER_INT_BITS = 8
"""Head and embeddings beside codecs other than trellis: int8 with a scale a row."""


@dataclass(frozen=True)
class Preset:
    """A method by the name that users know it by. rotate: whether inputs are rotated unless said otherwise."""

    codec: str
    solver: str
    rotate: bool
    group_size: int = 0
    table: dict[str, Any] | None = None
    widths: tuple[float, ...] = ()
    """Bits that it exists for; empty: all of its codec."""


PRESETS = {
    "trellis": Preset("trellis", "ldlq", True),
    "gptq": Preset("int", "gptq", True, DEFAULT_GROUP_SIZE),
    "awq": Preset("int", "awq", False, DEFAULT_GROUP_SIZE),
    "nf4": Preset("lut", "rtn", False, DEFAULT_GROUP_SIZE, {"table": "nf4"}, (4,)),
    "higgs": Preset("lut", "rtn", True, 0, {"table": "lloyd", "dims": 2}, (2, 3, 4)),
    "mxfp4": Preset("float", "rtn", False, 32, {"scale_format": "e8m0"}, (4,)),
    "nvfp4": Preset("float", "rtn", False, 16, {"scale_format": "e4m3"}, (4,)),
    "squeezellm": Preset("lut", "squeezellm", False, 0, {"table": "kmeans", "table_scope": "row", "scaled": False}),
}

FLOAT_ELEMENTS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
"""Of codec float by its bits. Of the two with 6, e2m3 has a third of e3m2's squared error on N(0, 1)."""

EFFORTS = {"fast": 12, "normal": 16, "best": 16}
"""Window of trellis codes by effort: what the search takes is proportional to 2^window. "best" tunes scales and norms
against the original model afterwards."""


def scheme_for(
    codec: str,
    bits: float,
    group_size: int | None,
    asymmetric: bool = False,
    *,
    window: int = 16,
    table: dict[str, Any] | None = None,
) -> Scheme:
    """The scheme of `codec` at `bits` bits a weight. PlanError where they do not go together."""
    group = DEFAULT_GROUP_SIZE if group_size is None else group_size
    values: dict[str, Any]
    if codec not in ("float", "int", "lut", "trellis"):
        raise PlanError(f"unknown codec {codec!r}; there are {codec_names()}")
    if asymmetric and codec != "int":
        raise PlanError(f"--asymmetric is of codec int; {codec} has no zero point")
    if codec == "trellis":
        if group_size:
            raise PlanError(
                f"--group-size {group_size}: codec trellis has one scale a row; leave it out, or name a codec"
            )
        values = {"codec": codec, "rate": bits, "window": window}
    elif bits != int(bits):
        raise PlanError(f"--bits {bits:g} --codec {codec}: only codec trellis has fractions of a bit")
    elif codec == "int":
        values = {"codec": codec, "bits": int(bits), "group_size": group, "symmetric": not asymmetric}
    elif codec == "float":
        if int(bits) not in FLOAT_ELEMENTS:
            raise PlanError(f"--bits {bits:g} --codec float: it has {list(FLOAT_ELEMENTS)} bits")
        values = {"codec": codec, "element": FLOAT_ELEMENTS[int(bits)], "group_size": group, **(table or {})}
    else:
        table = table or {"table": "lloyd"}
        values = {"codec": codec, "entries": 1 << int(bits) * table.get("dims", 1), "group_size": group, **table}
    try:
        return Scheme.from_dict(values)
    except SchemeError as error:
        options = f"--bits {bits:g} --codec {codec}" + ("" if codec == "trellis" else f" --group-size {group}")
        raise PlanError(f"{options}: {error}") from None


def outer_scheme(bits: float, group_size: int | None, codec: str = "int", window: int = 16) -> Scheme | None:
    """Of embeddings and head; 16 keeps them. Beside trellis codes, and for fractions, up to 5 bits are a trellis code,
    rotated and ordered; else int, at 8 bits with a scale a row, below with a scale a group."""
    if bits == 16:
        return None
    if bits != int(bits) or (codec == "trellis" and bits <= MOST_TRELLIS_BITS):
        return scheme_for("trellis", bits, None, window=window).replace(transforms=("rotate", "order"))
    return scheme_for("int", bits, 0 if bits >= 8 else group_size)


def make_plan(
    *,
    bits: float | None = None,
    preset: str | None = None,
    codec: str | None = None,
    solver: str | None = None,
    group_size: int | None = None,
    asymmetric: bool = False,
    rotate: bool | None = None,
    head_bits: float | None = None,
    embed_bits: float | None = None,
    effort: str = "normal",
    keep: Sequence[str] = (),
    set_: Sequence[str] = (),
    seed: int = 0,
    fold: bool = False,
) -> Plan:
    """The plan of `quantize run`. Raises PlanError.

    bits: 1 to 5 in sixteenths, 6 to 8 whole; 16 keeps every weight. preset: one of PRESETS; other options refine it.
    Without preset and codec, up to 5 bits are a trellis code, unless the solver, the group size or the zero point
    asked for belong to `int`. rotate: None is as the preset has it, or with solvers that feed errors back, where it
    pays (the README has a table). effort: one of EFFORTS. fold: the rotation of the residual stream goes into the
    weights beside it, where that is exact, instead of being computed while the model runs. It saves rotations and costs
    quality: the norms' gains, which damp the inputs' outliers, move into the weights that are
    rounded.
    """
    for name, width in (("--bits", bits), ("--head-bits", head_bits), ("--embed-bits", embed_bits)):
        if width is not None and width != 16 and not 1 <= width <= 8:
            raise PlanError(f"{name} is 1 to 8, or 16 to keep the weights; got {width:.15g}")
    if effort not in EFFORTS:
        raise PlanError(f"--effort is one of {list(EFFORTS)}; got {effort!r}")
    window = EFFORTS[effort]
    width = DEFAULT_BITS if bits is None or bits == 16 else bits
    base = _base(preset, codec, solver, group_size, asymmetric, width)
    solver = base.solver if solver is None else solver
    group = group_size if group_size is not None or base.codec == "trellis" else base.group_size
    scheme = scheme_for(base.codec, width, group, asymmetric, window=window, table=base.table)
    try:
        _, rounding = plan_solver(scheme, solver)
    except SchemeError as error:
        raise PlanError(f"--solver: {error}") from None
    linear = None
    if bits != 16:
        feeds_back = rounding.name in ("gptq", "ldlq")
        transforms = ["rotate"] if (base.rotate or feeds_back if rotate is None else rotate) else []
        if rounding.name == "ldlq":
            transforms.append("order")
        linear = scheme.replace(transforms=tuple(transforms))
    if bits == 16:
        outer = 16.0
    else:  # a bit more than the layers: the head's error reaches the output undiminished
        outer = min(width + 1, MOST_TRELLIS_BITS) if base.codec == "trellis" else OUTER_INT_BITS
    one = head_bits if head_bits is not None else embed_bits
    widths = [own if own is not None else (one if one is not None else outer) for own in (head_bits, embed_bits)]
    head, embedding = (outer_scheme(w, group_size, base.codec, window) for w in widths)
    rules = [Rule(pattern, None) for pattern in keep]
    for text in set_:
        pattern, separator, value = text.partition("=")
        if not separator or not pattern:
            raise PlanError(f"--set {text!r} is not PATTERN=SCHEME, such as 'down_proj=bits=8' or 'lm_head=int,bits=6'")
        rules.append(Rule(pattern, parse_scheme(value, linear)))
    return Plan(linear, head, embedding, tuple(rules), solver, seed, fold, tune=effort == "best")


def _base(
    preset: str | None, codec: str | None, solver: str | None, group_size: int | None, asymmetric: bool, bits: float
) -> Preset:
    """The preset, or what codec and solver amount to without one."""
    if preset is not None:
        if preset not in PRESETS:
            raise PlanError(f"--preset is one of {list(PRESETS)}; got {preset!r}")
        chosen = PRESETS[preset]
        for name, value, own in (("--codec", codec, chosen.codec), ("--solver", solver, chosen.solver)):
            if value is not None and value != own:
                raise PlanError(f"--preset {preset} is {name} {own}; got {name} {value}: leave one of them out")
        if chosen.widths and bits not in chosen.widths:
            raise PlanError(
                f"--preset {preset} is for {' or '.join(map(str, chosen.widths))} bits; got --bits {bits:g}"
            )
        return chosen
    if codec is None:
        of_int = (solver is not None and solver != "ldlq") or group_size is not None or asymmetric
        codec = "int" if bits > MOST_TRELLIS_BITS or (of_int and bits == int(bits)) else "trellis"
    if codec == "trellis":
        return Preset(codec, "ldlq", solver is None)
    return Preset(codec, "gptq", False, DEFAULT_GROUP_SIZE)
