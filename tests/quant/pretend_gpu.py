"""A GPU that is not there: tensors that say they are on `DEVICE`, with numbers that the CPU computes.

Whatever torch does with them goes on to ordinary tensors inside, so results are the CPU's, bit for bit, and code that
looks at numbers runs as ever. What a GPU would refuse is refused: operands on two devices, an address read by native
code, numpy. What is read back is counted. (FakeTensorMode cannot be used for this: it has no numbers, and in a torch
without CUDA it cannot even index a tensor on "cuda".)

Not followed: gradients, which would be recorded between the tensors inside.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 7)  # no machine's: what is cached for it is nobody else's

_NAMES = "arange empty empty_strided eye full linspace logspace ones rand randint randn randperm tensor zeros"
FACTORIES = {getattr(torch, name) for name in _NAMES.split()}
_PROPERTIES: dict[Any, Any] = {
    Tensor.device.__get__: DEVICE,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.is_meta.__get__: False,
}
_ON_THE_HOST = {Tensor.numpy, Tensor.data_ptr, Tensor.__array__, Tensor.untyped_storage}
_READS = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}
_READS |= {Tensor.cpu, torch.equal}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.copy_}
_INDEXED_FROM_ANYWHERE = {Tensor.__getitem__, Tensor.__setitem__}


class GpuTensor(Tensor):
    """A tensor on DEVICE; `inner`: the ordinary one that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[GpuTensor], inner: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} was reached by another way than torch's Python functions")


class PretendGpu(TorchFunctionMode):
    """While it lasts, torch has DEVICE. read: {function: how often a value came back}; unplaced: "file:line" of every
    factory call in `watched` that names no device."""

    def __init__(self, *watched: Path) -> None:
        super().__init__()
        self.watched = tuple(str(folder) for folder in watched)
        self.read: Counter[str] = Counter()
        self.unplaced: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            caller = sys._getframe(1)
            name = caller.f_code.co_filename
            if name.startswith(self.watched):
                self.unplaced.add(f"{name}:{caller.f_lineno}")
        return _run(func, args, kwargs, self.read)


def inside(tensor: Tensor) -> Tensor:
    """The ordinary tensor with the numbers."""
    return tensor.inner if isinstance(tensor, GpuTensor) else tensor


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], read: Counter[str]) -> Any:
    gpu: dict[int, GpuTensor] = {}
    elsewhere: list[Tensor] = []
    plain_args = [_plain(a, gpu, elsewhere if func not in _INDEXED_FROM_ANYWHERE else []) for a in args]
    plain_kwargs = _plain(kwargs, gpu, elsewhere) if kwargs else kwargs
    target = _target(func, args, kwargs)
    if not gpu:
        if target is None or target.type != "cuda":
            return func(*args, **kwargs)
    elif func in _PROPERTIES:
        return _PROPERTIES[func]
    elif func in _ON_THE_HOST:
        raise RuntimeError(f"{func.__name__} of a tensor on {DEVICE}: the CPU cannot read it")
    elif func in _INDEXED_FROM_ANYWHERE:
        _plain(args[2:], {}, elsewhere)
    if elsewhere and gpu and func not in _MOVES:
        shape = list(elsewhere[0].shape)
        raise RuntimeError(f"{func.__name__}: one operand is on {DEVICE}, another, {shape}, on {elsewhere[0].device}")
    if func in _READS:
        read[func.__name__] += 1
    if func is torch.histc:  # of whole numbers: on GPUs alone
        plain_args[0], dtype = plain_args[0].float(), plain_args[0].dtype
        return GpuTensor(func(*plain_args, **plain_kwargs).to(dtype))
    out = func(*plain_args, **plain_kwargs)
    if func is Tensor.cpu or (target is not None and target.type == "cpu"):
        read["cpu"] += bool(gpu) and func is not Tensor.cpu
        return _each(out, lambda t: t.clone() if id(t) in gpu else t)  # a copy always has memory of its own
    if func is Tensor.to and not gpu:
        out = out.clone()
    return _each(out, lambda t: gpu[id(t)] if id(t) in gpu else GpuTensor(t))


def _plain(value: Any, gpu: dict[int, GpuTensor], elsewhere: list[Tensor]) -> Any:
    """What the CPU is given for a value; its tensors that are on the GPU, and those of several numbers that are not."""
    if isinstance(value, GpuTensor):
        gpu[id(value.inner)] = value
        return value.inner
    if isinstance(value, Tensor):
        if value.ndim:
            elsewhere.append(value)
        return value
    if type(value) in (tuple, list):
        return type(value)(_plain(v, gpu, elsewhere) for v in value)
    if type(value) is dict:
        return {k: _plain(v, gpu, elsewhere) for k, v in value.items()}
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device("cpu") if torch.device(value).type == "cuda" else value
    return value


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return (
        tree_map(lambda v: change(v) if isinstance(v, Tensor) else v, value)
        if isinstance(value, (tuple, list))
        else value
    )


def _target(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if func is Tensor.cuda:
        return DEVICE
    if func is Tensor.to and len(args) > 1:
        if isinstance(args[1], Tensor):
            return args[1].device
        if isinstance(args[1], (str, torch.device)):
            return torch.device(args[1])
    return None
