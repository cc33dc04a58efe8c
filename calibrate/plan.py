"""Which weight is stored how: ordered rules (pattern -> Scheme, or None to keep 16 bits), the last match wins."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..quant.lut import LutScheme
from ..quant.scheme import Scheme, SchemeError
from .structure import Weight


class PlanError(ValueError):
    """A rule that cannot be followed. One line."""


@dataclass(frozen=True)
class Rule:
    """pattern: a glob on the module's or parameter's name, or on its last parts ("down_proj", "layers.0.*"), or
    "re:" and a regular expression searched in the name. scheme: None keeps the weight as it is."""

    pattern: str
    scheme: Scheme | None

    def matches(self, parameter: str) -> bool:
        names = (parameter, parameter.rpartition(".")[0])
        if self.pattern.startswith("re:"):
            return any(re.search(self.pattern[3:], name) for name in names)
        return any(fnmatch.fnmatchcase(n, p) for n in names for p in (self.pattern, "*." + self.pattern))


@dataclass(frozen=True)
class Plan:
    """Rules for the weights of a model, the solver that rounds them, and the seed of random signs.

    linear: scheme of linear layers inside the blocks. head: of the output head and any other linear layer outside the
    blocks. embedding: of token embeddings. None keeps 16 bits. rules: exceptions, in order. fold: where schemes rotate
    and the architecture allows, fold the rotation of the residual stream into the weights beside it. tune: fit scales
    and norms to the original model's output afterwards (calibrate/tune.py).
    """

    linear: Scheme | None
    head: Scheme | None = None
    embedding: Scheme | None = None
    rules: tuple[Rule, ...] = ()
    solver: str = "gptq"
    seed: int = 0
    fold: bool = False
    tune: bool = False

    def resolve(
        self,
        weights: dict[str, Weight],
        in_block: Iterable[str],
        *,
        tied: Mapping[str, str] = MappingProxyType({}),
        only_kept: Iterable[str] = (),
    ) -> dict[str, Scheme | None]:
        """{parameter: scheme | None} for every quantizable weight.

        tied: other names of weights, which rules may use. only_kept: parameters that no scheme encodes; rules may keep
        them. PlanError for a rule that matches nothing, a bad pattern, a scheme that does not fit a weight's shape, or
        a head and embeddings that are one weight and are to be stored in two ways.
        """
        inside = set(in_block)
        names = {name: name for name in weights} | {k: v for k, v in tied.items() if v in weights}
        undecided = {k for k, w in weights.items() if w.head and w.embedding and self.head != self.embedding}
        chosen: dict[str, Scheme | None] = {}
        for name, weight in weights.items():
            if weight.embedding:
                chosen[name] = self.embedding
            elif weight.router:
                chosen[name] = None
            else:
                chosen[name] = self.linear if name in inside else self.head
        for rule in self.rules:
            try:
                hit = [name for other, name in names.items() if rule.matches(other)]
                beside = [name for name in only_kept if rule.matches(name)]
            except re.error as error:
                raise PlanError(f"the pattern {rule.pattern!r} is no regular expression: {error}") from None
            if beside and rule.scheme is not None:
                raise PlanError(f"the pattern {rule.pattern!r} matches {beside[0]}, which can only be kept")
            if not hit and not beside:
                example = next(iter(weights), "none at all")
                raise PlanError(
                    f"the pattern {rule.pattern!r} matches none of {len(weights)} weights (one is {example})"
                )
            chosen.update(dict.fromkeys(hit, rule.scheme))
            undecided -= set(hit)
        if undecided:
            raise PlanError(
                "the head and the embeddings of this model are one tensor (tied); give --head-bits and --embed-bits "
                "the same value"
            )
        for name, scheme in chosen.items():
            if scheme is None:
                continue
            try:
                scheme.check_shape(weights[name].shape[-2:])
            except SchemeError as error:
                raise PlanError(f"{name}: {error}; give it another scheme (--set) or --keep it") from None
        return chosen

    def solver_for(self, weight: Weight, scheme: Scheme, inside: bool) -> str:
        """The solver that rounds a weight. inside: whether it stands in a block.

        Embeddings are looked up, not multiplied: their rounding is to nearest, unless they are the head as well.
        Layers outside the blocks, the head apart, are not calibrated. Codes of whole blocks of columns, beside solvers
        that round column by column, get the block by block form; what SqueezeLLM cannot code gets GPTQ.
        """
        if not weight.head and not inside:
            return "rtn"
        solver = self.solver
        if weight.embedding:  # AWQ's scale of the columns would have to be undone at every look-up
            solver = solver.removeprefix("awq+").replace("awq", "rtn")
        if solver == "squeezellm" and not isinstance(scheme, LutScheme):
            solver = "gptq"
        return "ldlq" if solver == "gptq" and scheme.block > 1 else solver

    def to_dict(self) -> dict[str, Any]:
        def plain(scheme: Scheme | None) -> Any:
            return "keep" if scheme is None else scheme.to_dict()

        return {
            "linear": plain(self.linear),
            "head": plain(self.head),
            "embedding": plain(self.embedding),
            "rules": [[rule.pattern, plain(rule.scheme)] for rule in self.rules],
            "solver": self.solver,
            "seed": self.seed,
            "fold": self.fold,
            "tune": self.tune,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Plan:
        """The plan that `to_dict` describes. PlanError where it is none."""

        def scheme(value: Any) -> Scheme | None:
            return None if value == "keep" else Scheme.from_dict(value)

        try:
            plan = Plan(
                scheme(values["linear"]),
                scheme(values.get("head", "keep")),
                scheme(values.get("embedding", "keep")),
                tuple(Rule(pattern, scheme(value)) for pattern, value in values.get("rules", [])),
                values.get("solver", "gptq"),
                values.get("seed", 0),
                values.get("fold", False),
                values.get("tune", False),
            )
            for value, kind in [(plan.solver, str), (plan.seed, int), *((rule.pattern, str) for rule in plan.rules)]:
                if not isinstance(value, kind):
                    raise TypeError(f"{value!r} is no {kind.__name__}")
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a plan: {error}") from None


def parse_scheme(text: str, base: Scheme | None) -> Scheme | None:
    """A scheme from the command line: "keep"; JSON; or "int,bits=3,group_size=32" ("bits=3" alone changes `base`)."""
    if text in ("keep", "16"):
        return None
    try:
        if text.lstrip().startswith("{"):
            return Scheme.from_dict(json.loads(text))
        parts = [part.strip() for part in text.split(",") if part.strip()]
        values: dict[str, Any] = {}
        if parts and "=" not in parts[0]:
            values["codec"] = parts.pop(0)
        elif base is not None:
            values = base.to_dict()
        for part in parts:
            key, separator, value = part.partition("=")
            if not separator:
                raise SchemeError(f"{part!r} is not key=value")
            values[key] = json.loads(value) if re.fullmatch(r"-?[\d.]+|true|false|\[.*\]", value) else value
        return Scheme.from_dict(values)
    except (SchemeError, json.JSONDecodeError) as error:
        raise PlanError(f"{text!r} is no scheme: {error}") from None
