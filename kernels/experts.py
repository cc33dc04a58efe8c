"""Fused mixture-of-experts weights, quantized expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.transform import get_transform
from .frozen import frozen_linear
from .module import QuantModule

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class QuantExperts(QuantModule):
    """In place of the experts modules of transformers 5 (Mixtral, Qwen3-MoE, DeepSeek-V2).

    gate_up_proj [experts, 2 * intermediate, hidden] and down_proj [experts, hidden, intermediate], each with a scheme
    (buffers `gate_up_proj`, `gate_up_proj_scale`, ...) or without one (then an ordinary parameter of that shape).
    y = sum over the chosen experts of weight * down(act(gate(x)) * up(x)).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        act_fn: Callable[[Tensor], Tensor],
        gate_up_scheme: Scheme | None,
        down_scheme: Scheme | None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.act_fn = act_fn
        shapes = {
            GATE_UP: (num_experts, 2 * intermediate_dim, hidden_dim),
            DOWN: (num_experts, hidden_dim, intermediate_dim),
        }
        for name, scheme in ((GATE_UP, gate_up_scheme), (DOWN, down_scheme)):
            if scheme is None:
                self.register_parameter(name, nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype)))
            else:
                self._declare(name, scheme, shapes[name], device)

    @classmethod
    def from_module(cls, module: nn.Module, weights: dict[str, QuantizedTensor]) -> QuantExperts:
        """The quantized form of a transformers experts module; projections not in `weights` keep their parameter.

        weights: {"gate_up_proj" and/or "down_proj": QuantizedTensor [experts, out, in]}. ValueError where the module
        computes something else (biases, transposed weights, no gate, a gate or norm of its own).
        """
        check_experts(module)
        experts, twice, hidden = (weights[GATE_UP] if GATE_UP in weights else getattr(module, GATE_UP)).shape
        gate_up, down = (weights[name].scheme if name in weights else None for name in (GATE_UP, DOWN))
        act_fn: Any = module.act_fn
        made = cls(experts, hidden, twice // 2, act_fn, gate_up, down, device="meta")
        for name in (GATE_UP, DOWN):
            if name in weights:
                made._fill(name, weights[name])
            else:
                made.register_parameter(name, getattr(module, name))
        return made

    def to_tensor(self, projection: str) -> QuantizedTensor:
        """The canonical stack of "gate_up_proj" or "down_proj"."""
        return self._canonical(projection)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] for hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k].

        An index of num_experts or more marks a slot that belongs to no expert here and adds nothing.
        """
        if hidden_states.device.type == "meta":
            return torch.empty_like(hidden_states)
        ready = {name: self._ready(name) for name in self._schemes}
        y = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = self._project(GATE_UP, expert, hidden_states[token], ready).chunk(2, dim=-1)
            down = self._project(DOWN, expert, self.act_fn(gate) * up, ready)
            y = y.index_add(0, token, (down * top_k_weights[token, slot, None]).float())
        return y.to(hidden_states.dtype)

    def _project(self, name: str, expert: int, x: Tensor, ready: dict[str, Any]) -> Tensor:
        if name not in ready:
            return nn.functional.linear(x, getattr(self, name)[expert])
        scheme = self._schemes[name]
        if scheme.transforms:
            fields = self._transform_fields(name, expert)
            for transform in scheme.transforms:
                x = get_transform(transform).apply_input(x, fields)
        kernel, packed = ready[name]
        return frozen_linear(x, kernel, packed.expert(expert), None, None)

    def extra_repr(self) -> str:
        schemes = ", ".join(f"{name}={self._schemes.get(name, 'kept')}" for name in (GATE_UP, DOWN))
        return f"{self.num_experts} experts, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}, {schemes}"


def check_experts(module: nn.Module) -> None:
    """ValueError, in words, where a fused experts module is not of the shape that QuantExperts computes."""
    where = type(module).__name__
    for name in (GATE_UP, DOWN):
        if getattr(getattr(module, name, None), "ndim", 0) != 3:
            raise ValueError(f"{where} has no three-dimensional {name}: it cannot run as QuantExperts")
    wrong = {"is_transposed": "its weights are transposed", "has_bias": "it has biases"}
    for flag, reason in wrong.items():
        if getattr(module, flag, False):
            raise ValueError(f"{where} cannot run as QuantExperts: {reason}")
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{where} cannot run as QuantExperts: it normalises each expert's output")
    if not getattr(module, "has_gate", True):
        raise ValueError(f"{where} cannot run as QuantExperts: its experts have no gate")
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and not gate.__name__.startswith("_default"):
        raise ValueError(f"{where} cannot run as QuantExperts: it combines gate and up in a way of its own")
    if not callable(getattr(module, "act_fn", None)):
        raise ValueError(f"{where} cannot run as QuantExperts: it has no act_fn")
