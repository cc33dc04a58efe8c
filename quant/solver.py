"""How the rounding is chosen. A solver is a module of this folder with a `SOLVER`, found by its name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .registry import registered
from .scheme import Scheme, SchemeError
from .stats import Stats
from .tensor import QuantizedTensor
from .transform import get_transform


class Solver(Protocol):
    name: str
    needs_stats: bool

    def solve(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> dict[str, Tensor]:
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
    w = w.detach().float()
    chosen: dict[str, Tensor] = {}
    for name in scheme.transforms:
        transform = get_transform(name)
        fields = transform.choose(w, stats, seed, scheme)
        w = transform.apply_weight(w, fields)
        stats = None if stats is None else transform.apply_stats(stats, fields)
        chosen.update(fields)
    return QuantizedTensor(scheme, tuple(w.shape), {**rounding.solve(w, scheme, stats), **chosen})


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
