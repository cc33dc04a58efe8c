"""The norm before a head that is tied to rotated embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..quant.hartley import hartley_hadamard

_LARGE = 1e4
"""Columns of an input whose mean square drowns every epsilon: what an RMS norm makes of it is its gain."""


class RotatedNorm(nn.Module):
    """y = R norm(R x), in place of the RMS norm `norm` that it takes over; R is the Hartley-Hadamard transform.

    Where T = R diag(s) is folded in, embeddings are E T^T and the stream is x = T h; logits are E T^T y = E norm(h) for
    y = T norm(T^T x). The signs s cancel: they commute with the gain, and an RMS norm does not see them. The state is
    the norm's own: `weight` [hidden_size]. Computed in float32; gives the dtype of x.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        if [name for name, _ in norm.named_parameters()] != ["weight"] or weight.ndim != 1:
            raise ValueError(f"{type(norm).__name__} cannot be rotated: it is no norm whose only parameter is a gain")
        self.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        norm.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
        self.__dict__["norm"] = norm  # no submodule: state_dict knows the gain once, under the norm's own name

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] for x of that shape; a meta x gives a meta y."""
        if x.device.type == "meta":
            return torch.empty_like(x)
        y = self._norm(hartley_hadamard(x.float()), self.weight)
        return hartley_hadamard(y.float()).to(x.dtype)

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
        """For the head's weight W [out, hidden_size], float32, the one behind the norm without R and with gain 1:
        W R diag(gain) R."""
        return hartley_hadamard(hartley_hadamard(weight.float()) * self.gain())

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, norm={self.__dict__['norm']!r}"
