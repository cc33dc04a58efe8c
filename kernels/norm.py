"""The norm before a head that is tied to rotated embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..quant.rotate import TRANSFORM

_LARGE = 1e4
"""Columns of an input whose mean square drowns every epsilon: what an RMS norm makes of it is its gain."""


class RotatedNorm(nn.Module):
    """y = T norm(T^T x), in place of the RMS norm `norm` that it takes over; T is the transform `rotate`.

    With embeddings E T^T and a residual stream T h, logits are E T^T y = E norm(h) for the x = T h it gets. Its state
    is the norm's own `weight` [hidden_size] and `weight_signs`, the field "signs" of T, uint8 [ceil(hidden_size/8)],
    empty until loaded. Computed in float32; gives the dtype of x.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        if [name for name, _ in norm.named_parameters()] != ["weight"] or weight.ndim != 1:
            raise ValueError(f"{type(norm).__name__} cannot be rotated: it is no norm whose only parameter is a gain")
        self.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        size = -(-weight.shape[0] // 8)
        self.register_buffer("weight_signs", torch.empty(size, dtype=torch.uint8, device=weight.device))
        norm.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
        self.__dict__["norm"] = norm  # no submodule: state_dict knows the gain once, under the norm's own name

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] for x of that shape; a meta x gives a meta y."""
        if x.device.type == "meta":
            return torch.empty_like(x)
        fields = {"signs": self.get_buffer("weight_signs")}
        y = self._norm(TRANSFORM.undo_weight(x, fields), self.weight)
        return TRANSFORM.apply_input(y.float(), fields).to(x.dtype)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(self.__dict__["norm"], {"weight": weight}, (x,))

    @torch.no_grad()
    def gain(self) -> Tensor:
        """What the norm multiplies by, float32 [hidden_size]: its weight, or 1 + weight."""
        weight = self.weight.float()
        return self._norm(torch.full_like(weight, _LARGE), weight)

    @torch.no_grad()
    def unit_weight(self) -> Tensor:
        """The weight [hidden_size], in its dtype, that makes the gain 1."""
        zero = torch.zeros_like(self.weight, dtype=torch.float32)
        gain = self._norm(torch.full_like(zero, _LARGE), zero)
        return (1 - gain.round()).to(self.weight.dtype)

    @torch.no_grad()
    def head(self, weight: Tensor) -> Tensor:
        """For the head's weight W [out, hidden_size], float32, the one behind the norm without T and with gain 1:
        W T diag(gain) T^T."""
        fields = {"signs": self.get_buffer("weight_signs")}
        return TRANSFORM.apply_weight(TRANSFORM.undo_weight(weight, fields) * self.gain(), fields)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, norm={self.__dict__['norm']!r}"
