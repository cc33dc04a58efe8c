"""How the rounding is chosen. A solver is a module of this folder with a `SOLVER`, found by its name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .registry import registered
from .scheme import Scheme, SchemeError
from .solution import Solution
from .stats import Stats
from .tensor import QuantizedTensor
from .transform import derive, get_transform


class Solver(Protocol):
    name: str
    needs_stats: bool
    needs_fisher: bool
    """Whether the statistics must hold the Fisher diagonal, which takes the whole model and a backward pass."""

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Solution:
        """The codec's fields for w, float32 [out, in], already transformed, as are the statistics."""


def solver_names() -> list[str]:
    return list(registered("SOLVER"))


def get_solver(name: str) -> Solver:
    """The solver of that name, or SchemeError that lists those there are."""
    solvers = registered("SOLVER")
    if name not in solvers:
        raise SchemeError(f"unknown solver {name!r}; there are {list(solvers)}")
    return solvers[name]


def quantize_tensor(
    w: Tensor, scheme: Scheme | dict, *, solver: str = "rtn", stats: Stats | None = None, seed: int = 0
) -> QuantizedTensor:
    """Quantize one weight [out_features, in_features] (any float dtype; computed in float32 on w's device).

    scheme: a Scheme or its dict. solver: "rtn", "gptq", "awq" (which adds the transform "scale" where the scheme
    has none), or "awq+gptq". stats: the calibration statistics; "gptq" and "awq" need them. seed: of the random
    signs of "rotate". Raises SchemeError for a scheme or shape that makes no sense, ValueError for weights that are
    not finite.
    """
    scheme = Scheme.from_dict(scheme)
    scheme, rounding = plan_solver(scheme, solver)
    scheme.check_shape(tuple(w.shape))
    if not bool(w.isfinite().all()):
        raise ValueError(f"the weight {list(w.shape)} holds NaN or infinite values")
    if stats is None and (rounding.needs_stats or "scale" in scheme.transforms):
        raise ValueError(f"solver {solver!r} needs calibration statistics (stats=)")
    w, stats, chosen = transform_weight(w.detach().float(), scheme, stats, seed)
    solution = rounding.solve(w, scheme, stats)
    return QuantizedTensor(scheme, tuple(w.shape), {**solution.fields, **chosen}, solution.notes)


def transform_weight(
    w: Tensor, scheme: Scheme, stats: Stats | None, seed: int
) -> tuple[Tensor, Stats | None, dict[str, Tensor]]:
    """(w, statistics, fields of the transforms): what the codec is to see of w, float32 [out, in]."""
    transforms = [get_transform(name) for name in scheme.transforms]
    chosen: dict[str, Tensor] = {}
    if stats is not None and not any(t.by_weight for t in transforms):
        chosen, stats = derive(stats, scheme.transforms, w.shape[1], seed, scheme)
        for transform in transforms:
            w = transform.apply_weight(w, chosen)
        return w, stats, dict(chosen)
    for transform in transforms:
        fields = transform.choose(w, stats, seed, scheme)
        w = transform.apply_weight(w, fields)
        stats = None if stats is None else transform.apply_stats(stats, fields)
        chosen.update(fields)
    return w, stats, chosen


def plan_solver(scheme: Scheme, solver: str) -> tuple[Scheme, Solver]:
    """(the scheme as it will be stored, the solver that rounds): "awq" is the transform "scale", then rounding."""
    names = solver.split("+")
    if names[0] == "awq":
        if "scale" not in scheme.transforms:
            scheme = scheme.replace(transforms=("scale", *scheme.transforms))
        names = names[1:] or ["rtn"]
    if len(names) != 1:
        raise SchemeError(f"solver {solver!r}: one of {[*solver_names(), 'awq', 'awq+gptq']}")
    return scheme, get_solver(names[0])
