"""The compiled model as something that gradients can change: codes stay, multipliers of rows and gains of norms move.

A quantized linear layer computes y = (x W^T) * m + b with a multiplier m [out_features], 1 at first. Its gradient needs
x W^T and dy alone, so a step costs the gradients of activations but none of a weight. m goes into the stored scales:
each codec's value is a scale times something, and its scales' first dimension is the row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..formats.native import stored_name
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor, field_specs
from .plan import PlanError
from .skeleton import Skeleton
from .stream import run_model
from .structure import quantizable


@dataclass(frozen=True)
class Compiled:
    """A compiled checkpoint, wherever its tensors are.

    skeleton: of the checkpoint that it was made from, with the fold that it was made with. schemes: {parameter: Scheme}
    of its quantized weights. read: a tensor by its stored name, as written.
    """

    skeleton: Skeleton
    schemes: Mapping[str, Scheme]
    read: Callable[[str], Tensor]

    def quantized(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor:
        scheme = self.schemes[name]
        fields = {f: self.read(stored_name(name, f)) for f in field_specs(scheme, shape)}
        return QuantizedTensor(scheme, shape, fields)


class _ScaledProduct(torch.autograd.Function):
    """x [..., in], w [out, in] of any float dtype, m [out] -> (x w^T) * m in float32. w is cast again for the gradient:
    a float32 copy of every layer would be kept until then otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, m: Tensor) -> Tensor:
        z = F.linear(x, w.float())
        ctx.save_for_backward(z, w, m)
        return z * m

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (dy,) = grads
        z, w, m = ctx.saved_tensors
        dm = (dy * z).reshape(-1, m.shape[0]).sum(0) if ctx.needs_input_grad[2] else None
        dx = (dy * m) @ w.float() if ctx.needs_input_grad[0] else None
        return dx, None, dm


class ScaledLinear(nn.Module):
    """Stands in for a linear layer (or a Conv1D): a frozen weight [out, in] and a multiplier of its rows."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.multiplier = nn.Parameter(torch.ones(weight.shape[0], device=weight.device))
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        y = _ScaledProduct.apply(x.float(), self.weight, self.multiplier)
        return y if self.bias is None else y + self.bias


@dataclass
class Gain:
    """The weight of a norm, as base + (base + offset) * change: `change` is relative to what the norm multiplies by,
    which is the weight plus `offset` (1 in Gemma). dtype: that it is stored in; the model computes with the rounded."""

    module: nn.Module
    base: Tensor
    offset: float
    dtype: torch.dtype
    change: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.change = nn.Parameter(torch.zeros_like(self.base))

    def value(self) -> Tensor:
        return self.base + (self.base + self.offset) * self.change

    def put(self) -> None:
        """Into the module, rounded as it will be stored; the gradient passes the rounding as if there were none."""
        value = self.value()
        rounded = value.detach().to(self.dtype).float()
        self.module.weight = value + (rounded - value.detach())


class Student:
    """The compiled model in float32 on the skeleton's device, its quantized weights in `dtype`; a context, which
    releases it.

    parameters: {name: Parameter} of what is tuned: multipliers under the names of their weights (where `scales`), the
    relative changes of gains under the names of theirs (where `norms`). left_out: {name: why} of quantized weights and
    norms that stay as they are.
    """

    def __init__(self, compiled: Compiled, dtype: torch.dtype, *, scales: bool = True, norms: bool = True) -> None:
        self.compiled, self.skeleton, self.model = compiled, compiled.skeleton, compiled.skeleton.model
        self.dtype = dtype
        self.parameters: dict[str, nn.Parameter] = {}
        self.left_out: dict[str, str] = {}
        self.linears: dict[str, ScaledLinear] = {}
        self.gains: dict[str, Gain] = {}
        self._originals: dict[str, nn.Module] = {}
        self.weights = quantizable(self.model)
        self.head_name, self.head = find_head(self.model)
        self.head_size: int = self.head.get_parameter("weight").shape[0]
        try:
            self._load(scales)
            if norms:
                self._find_gains()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The model as it was: its own modules, parameters on meta."""
        for name, module in self._originals.items():
            self.model.set_submodule(name, module)
        self.skeleton.release(list(self.skeleton.parameters))
        for name, target in self.skeleton.tied.items():
            self.skeleton.put(name, self.skeleton.parameters[target])

    # -- computing

    @property
    def device(self) -> torch.device:
        return self.skeleton.device

    def hidden(self, tokens: Tensor) -> Tensor:
        """The input of the head, [batch, seq_len, hidden_size] float32, for tokens int64 [batch, seq_len]."""
        for gain in self.gains.values():
            gain.put()
        with self._in_place_of_head(_Catches()):
            try:
                run_model(self.model, tokens.to(self.device))
            except _AtHead as reached:
                return reached.hidden
        raise PlanError(f"{type(self.model).__name__} does not call its output head {self.head_name}")

    def logits_of(self, given: Tensor) -> Tensor:
        """What the model makes of `given` [1, seq_len, vocabulary] as the head's output; on the CPU, as `given` is."""
        for gain in self.gains.values():
            gain.put()
        tokens = torch.ones(given.shape[:2], dtype=torch.int64, device=self.device)
        with self._in_place_of_head(_Gives(given.to(self.device))), torch.no_grad():
            return self.model(input_ids=tokens).logits.cpu()

    @contextlib.contextmanager
    def _in_place_of_head(self, module: nn.Module) -> Iterator[None]:
        self.model.set_submodule(self.head_name, module)
        try:
            yield
        finally:
            self.model.set_submodule(self.head_name, self.head)

    # -- values to store

    def values(self) -> dict[str, Tensor]:
        """{stored name: tensor on the CPU} of every scale and gain that is tuned, as it will be stored."""
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, linear in self.linears.items():
                key = stored_name(name, "scale")
                scale = self.compiled.read(key)
                m = linear.multiplier.detach().cpu().view(-1, *[1] * (scale.ndim - 1))
                out[key] = (scale.float() * m).to(scale.dtype)
            for name, gain in self.gains.items():
                out[name] = gain.value().to(gain.dtype).cpu()
        return out

    def store(self, values: Mapping[str, Tensor]) -> None:
        """Be the model that has these values stored: weights decoded anew, multipliers 1, no change of gains."""
        with torch.no_grad():
            for name, linear in self.linears.items():
                qt = self.compiled.quantized(name, self.weights[name].shape)
                scale = values[stored_name(name, "scale")]
                qt = QuantizedTensor(qt.scheme, qt.shape, qt.fields | {"scale": scale})
                linear.weight.copy_(qt.to(self.device).dequantize(self.dtype))
                linear.multiplier.fill_(1)
            for name, gain in self.gains.items():
                gain.base = values[name].float().to(self.device)
                gain.change.zero_()

    # -- building

    def _load(self, scales: bool) -> None:
        for name in self.skeleton.parameters:
            if name not in self.compiled.schemes:
                value = self.compiled.read(name).to(self.device)
                self.skeleton.put(name, value.float() if value.is_floating_point() else value)
                continue
            weight = self.weights[name]
            qt = self.compiled.quantized(name, weight.shape).to(self.device)
            reason = self._reason(name, qt)
            if reason:
                self.left_out[name] = reason
            if reason or not scales:
                w = qt.dequantize(torch.float32)
                self.skeleton.put(name, w.T.contiguous() if weight.kind == "conv1d" else w)
                continue
            self._replace(name, qt)
        self.model.tie_weights()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for name, linear in self.linears.items():
            linear.multiplier.requires_grad_(True)
            self.parameters[name] = linear.multiplier

    def _replace(self, name: str, qt: QuantizedTensor) -> None:
        module_name = self.weights[name].module_name
        module = self.model.get_submodule(module_name)
        linear = ScaledLinear(qt.dequantize(self.dtype), module._parameters.get("bias"))
        self._originals[module_name] = module
        self.model.set_submodule(module_name, linear)
        self.linears[name] = linear
        if module is self.head:
            self.head = linear

    def _reason(self, name: str, qt: QuantizedTensor) -> str:
        """Why a quantized weight has no multiplier, "" where it has."""
        weight = self.weights[name]
        if weight.embedding:
            return "embeddings are looked up" + (", and the head is tied to them" if weight.head else "")
        if weight.kind not in ("linear", "conv1d"):
            return f"{weight.kind} in one 3-D weight"
        if name in self.skeleton.tied.values():
            return "shared by several layers"
        scale = qt.fields.get("scale")
        if scale is None or scale.ndim < 1 or scale.shape[0] != qt.shape[0] or not scale.is_floating_point():
            return f"codec {qt.scheme.codec} stores no scale of its rows here"
        return ""

    def _find_gains(self) -> None:
        for module_name, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            name = f"{module_name}.weight"
            if "Norm" not in type(module).__name__ or weight is None or weight.ndim != 1:
                continue
            offset = gain_offset(module) if name in self.skeleton.parameters else None
            if offset is None:
                self.left_out[name] = f"{type(module).__name__} does not multiply by its weight"
                continue
            dtype = self.skeleton.parameters[name].dtype
            gain = Gain(module, weight.detach(), offset, dtype)
            self.gains[name] = gain
            self.parameters[name] = gain.change
        for gain in self.gains.values():
            del gain.module._parameters["weight"]


def find_head(model: Any) -> tuple[str, nn.Module]:
    """(name, module) of the linear layer that gives the logits. PlanError for a model without one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise PlanError(
            f"{type(model).__name__} has no linear output head, so --effort best cannot compare what it gives; use "
            "--effort normal"
        )
    return name, head


class _AtHead(Exception):
    """The forward has reached the head; hidden: with this input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Catches(nn.Module):
    """In place of the head: ends the forward."""

    def forward(self, x: Tensor) -> Tensor:
        raise _AtHead(x)


class _Gives(nn.Module):
    """In place of the head: its output is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def gain_offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies by it (0, or 1 in Gemma), tried with numbers; None where it
    does something else."""
    weight = norm.get_parameter("weight")
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator, device="cpu").to(weight.device)
    others = {k: torch.zeros_like(p) for k, p in norm.named_parameters() if k != "weight"}

    def with_weight(value: float) -> Tensor:
        return functional_call(norm, {**others, "weight": torch.full_like(weight, value)}, (x,))

    try:
        with torch.no_grad():
            zero, one, two = (with_weight(v) for v in (0.0, 1.0, 2.0))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # a norm of more than one input, or of another width
        return None
    if not isinstance(zero, Tensor) or zero.shape != x.shape:
        return None
    unit = one - zero
    for offset in (0.0, 1.0):
        if torch.allclose(zero, offset * unit, atol=1e-4) and torch.allclose(two - one, unit, atol=1e-4):
            return offset if bool((unit.abs() > 1e-3).any()) else None
    return None
