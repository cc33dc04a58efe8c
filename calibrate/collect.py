"""Statistics of every quantizable layer's input while the calibration set runs through a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.stats import Stats
from .plan import PlanError
from .structure import Weight

PANEL = 256
"""Columns of one panel of the second moment: only the panels on and under the diagonal are computed."""


class Moment:
    """Running sums over tokens of x x^T and |x|, on one device."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.abs = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x: [..., features], any float dtype, on the moment's device."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        for i in range(0, n, PANEL):
            rows = slice(i, min(i + PANEL, n))
            columns = slice(0, rows.stop)
            self.sum[rows, columns].addmm_(x[:, rows].T, x[:, columns])
        self.abs += x.abs().sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def stats(self, release: bool = False) -> Stats:
        """release: the sum's memory becomes the Hessian's, and the moment is used up."""
        count = max(self.tokens, 1)
        hessian = self.sum if release else self.sum.clone()
        for i in range(0, hessian.shape[0], PANEL):  # panels above the diagonal were never computed
            hessian[i : i + PANEL, i + PANEL :] = hessian[i + PANEL :, i : i + PANEL].T
            square = hessian[i : i + PANEL, i : i + PANEL]
            square.copy_(square.tril() + square.tril(-1).T)
        hessian /= count
        return Stats(hessian, (self.abs / count).float(), self.tokens)


@contextlib.contextmanager
def collecting(model: nn.Module, weights: dict[str, Weight]) -> Iterator[dict[str, Moment | list[Moment]]]:
    """Hooks that gather, while the model's blocks run, a Moment for every weight: {parameter: Moment}.

    Weights whose layers are called with the very same tensor (q, k and v; gate and up) share one Moment. Fused experts
    get a list, one Moment an expert, from the tokens routed to it. Sums are taken where the inputs are.
    """
    moments: dict[str, Moment | list[Moment]] = {}
    recent: dict[str, Any] = {"input": None, "moment": None}
    leader: dict[str, Moment] = {}
    handles = []

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            shared = x is recent["input"]
            if name not in leader:
                leader[name] = recent["moment"] if shared else Moment(x.shape[-1], x.device)
                moments[name] = leader[name]
            if not (shared and leader[name] is recent["moment"]):
                leader[name].add(x)
            recent["input"], recent["moment"] = x, leader[name]

        return before

    for name, weight in weights.items():
        if weight.kind in ("linear", "conv1d"):
            module = model.get_submodule(weight.module_name)
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    for module_name in dict.fromkeys(w.module_name for w in weights.values() if w.kind == "experts"):
        module = model.get_submodule(module_name)
        handles.append(module.register_forward_hook(_experts_hook(module_name, moments), with_kwargs=True))
    try:
        yield moments
    finally:
        recent["input"] = None
        for handle in handles:
            handle.remove()


def _experts_hook(module_name: str, moments: dict[str, Moment | list[Moment]]) -> Any:
    """The inputs of both projections of every expert, by the experts' own formula, checked against their output."""

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x, index, gate = [*args, *kwargs.values()][:3]
        x = x.reshape(-1, x.shape[-1])
        count = module.gate_up_proj.shape[0]
        up: Any = moments.setdefault(
            f"{module_name}.gate_up_proj", [Moment(module.gate_up_proj.shape[2], x.device) for _ in range(count)]
        )
        down: Any = moments.setdefault(
            f"{module_name}.down_proj", [Moment(module.down_proj.shape[2], x.device) for _ in range(count)]
        )
        total = torch.zeros_like(x)
        for e in range(count):
            token, slot = torch.where(index.reshape(x.shape[0], -1) == e)
            if not len(token):
                continue
            routed = x[token]
            a, b = nn.functional.linear(routed, module.gate_up_proj[e]).chunk(2, -1)
            middle = module.act_fn(a) * b
            up[e].add(routed)
            down[e].add(middle)
            share = gate.reshape(x.shape[0], -1)[token, slot, None]
            total.index_add_(0, token, (nn.functional.linear(middle, module.down_proj[e]) * share).to(total.dtype))
        difference = float((total - output.reshape(total.shape)).norm())
        if not difference <= 0.02 * float(output.norm()) + 1e-6:
            raise PlanError(
                f"{module_name} ({type(module).__name__}) does not compute down(act(gate) * up): its experts' inputs "
                "are not known; use --solver rtn, which needs no statistics, or --keep '*.experts'"
            )

    return after


def finished(moments: dict[str, Moment | list[Moment]]) -> dict[str, Stats | list[Stats]]:
    """Statistics from moments, one object where weights share an input. The moments are used up, one by one."""
    done: dict[int, Stats | list[Stats]] = {}
    out: dict[str, Stats | list[Stats]] = {}
    for name, moment in moments.items():
        if id(moment) not in done:
            done[id(moment)] = expert_stats(moment) if isinstance(moment, list) else moment.stats(release=True)
        out[name] = done[id(moment)]
    return out


def expert_stats(moments: list[Moment]) -> list[Stats]:
    """Statistics by expert. One that no token reached gets the mean of the others (identity if none was reached)."""
    reached = [m for m in moments if m.tokens]
    features, device = moments[0].sum.shape[0], moments[0].sum.device
    if reached:
        total = sum(m.tokens for m in reached)
        everyone = Moment(features, device)
        everyone.tokens = total
        for m in reached:
            everyone.sum += m.sum
            everyone.abs += m.abs
        fallback = everyone.stats()
    else:
        fallback = Stats(torch.eye(features, device=device), torch.ones(features, device=device), 0)
    return [m.stats() if m.tokens else Stats(fallback.hessian, fallback.absmean, 0) for m in moments]
