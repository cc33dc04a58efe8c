"""Watching what a forward does to the residual stream, operation by operation.

A tensor on its way is one of

    Stream    the residual stream h: sums of the embeddings and of what blocks add
    Normed    norm(h) * gain, the output of an RMS norm of the stream
    Written   the output of weights that have hidden_size outputs; added to the stream, it makes them writers
    Parameter a weight or bias of the block

and anything else is an ordinary activation. A rotation of the stream commutes with sums and with factors that are the
same for all columns of a token. Whatever else is done to Stream and Normed, other than reading them with a weight,
ends the search with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Unfoldable(Exception):
    """Why the rotation of the residual stream cannot be folded into this model. One line."""


@dataclass(frozen=True)
class Stream:
    pass


@dataclass(frozen=True)
class Normed:
    gain: str  # parameter


@dataclass(frozen=True)
class Written:
    axes: frozenset[tuple[str, int]]  # (parameter, its axis of hidden_size outputs)


@dataclass(frozen=True)
class Parameter:
    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Foreign:
    reason: str  # why it must not be added to the stream


Label = Stream | Normed | Written | Parameter | Foreign


@dataclass(frozen=True)
class Reader:
    """A weight applied to norm(h) * gain. gain: the norm's parameter. axis: of the weight that meets h, -1 or -2."""

    gain: str
    axis: int


@dataclass
class Roles:
    """readers: {weight: Reader}. writers: {weight or bias: its axis that is added to the stream}."""

    readers: dict[str, Reader] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)


_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "alias", "detach", "clone", "contiguous", "_to_copy", "unsqueeze"}
_VIEWS |= {"squeeze", "slice", "expand", "lift_fresh"}
_SHAPE_ONLY = {f"new_{what}" for what in ("zeros", "ones", "empty", "full", "empty_strided")}
_SHAPE_ONLY |= {f"{what}_like" for what in ("zeros", "ones", "empty", "full", "rand", "randn")}
_FACTORS = {"mul", "div"}


class Trace(TorchDispatchMode):
    """Labels tensors by identity while a forward runs; `where` begins every reason."""

    def __init__(self, roles: Roles, hidden_size: int, where: str) -> None:
        super().__init__()
        self.roles, self.hidden_size, self.where = roles, hidden_size, where
        self.labels: dict[int, tuple[Tensor, Label]] = {}  # holds the tensors, so that no id is used twice
        self.used: set[str] = set()  # weights whose output went somewhere else than to the stream

    def label(self, value: Any) -> Label | None:
        known = self.labels.get(id(value)) if isinstance(value, Tensor) else None
        return None if known is None else known[1]

    def put(self, tensor: Tensor, label: Label) -> Tensor:
        self.labels[id(tensor)] = (tensor, label)
        return tensor

    def refuse(self, reason: str) -> Unfoldable:
        return Unfoldable(f"{self.where}: {reason}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        values = [*args, *(kwargs or {}).values()]
        flat = [t for v in values for t in (v if isinstance(v, (list, tuple)) else (v,))]
        tensors = [t for t in flat if isinstance(t, Tensor)]
        if any(self.label(t) is not None for t in tensors):
            name = func.overloadpacket.__name__
            name = name if name.startswith("_") else name.removesuffix("_")  # in place is the same
            result = self._result(name, args, tensors, out)
            if result is not None:
                self.put(out, result)
            elif isinstance(out, Tensor):
                self.labels.pop(id(out), None)  # computed in place, and no longer what it was
        return out

    def _result(self, name: str, args: Any, tensors: list[Tensor], out: Any) -> Label | None:
        if name in _SHAPE_ONLY:
            return None
        first = self.label(args[0])
        if isinstance(first, Parameter) and len(tensors) == 1:
            if name in ("t", "transpose") and args[0].ndim == 2:
                return Parameter(first.name, not first.transposed)
            if name in ("_to_copy", "detach", "alias", "clone") or (name == "view" and out.shape == args[0].shape):
                return first
            return None
        if name in _VIEWS and len(tensors) == 1:
            return self._keep(first, name, out)
        if name in _FACTORS | {"neg"}:
            return self._product(name, args, out)
        if name in ("add", "sub"):
            return self._sum(args)
        if name in ("mm", "linear"):
            matrix = self.label(args[1])
            if name == "linear" and isinstance(matrix, Parameter):
                matrix = Parameter(matrix.name, not matrix.transposed)
            return self._matmul(args[0], matrix, args[2] if len(args) > 2 else None, tensors, out)
        if name == "addmm" and len(tensors) == 3:
            return self._matmul(args[1], self.label(args[2]), args[0], tensors, out)
        self.elsewhere(name, tensors)
        return None

    def _keep(self, label: Label | None, name: str, out: Tensor) -> Label | None:
        """A view or a copy: the same as long as its last dimension is the whole hidden_size."""
        if out.ndim and out.shape[-1] == self.hidden_size:
            return label
        self.elsewhere(name, [], label)
        return None

    def _product(self, name: str, args: Any, out: Tensor) -> Label | None:
        """By a number, or by one number a token, a rotation commutes."""
        labelled = [a for a in args if self.label(a) is not None]
        others = [a for a in args if isinstance(a, Tensor) and self.label(a) is None]
        flat = all(a.ndim == 0 or a.shape[-1] == 1 for a in others)
        if len(labelled) == 1 and flat and not (name == "div" and labelled[0] is not args[0]):
            return self._keep(self.label(labelled[0]), name, out)
        self.elsewhere(name, labelled)
        return None

    def _sum(self, args: Any) -> Label | None:
        a, b = self.label(args[0]), self.label(args[1])
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Stream):
                if isinstance(other, Foreign):
                    raise self.refuse(other.reason)
                if isinstance(other, Written):
                    self._write(other)
                elif not isinstance(other, Stream):
                    raise self.refuse("something that is not the output of a weight is added to the residual stream")
                return one
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Written):
                if isinstance(other, Written):
                    return Written(one.axes | other.axes)
                if isinstance(other, Parameter) and args[0 if one is b else 1].ndim == 1:
                    return Written(one.axes | {(other.name, -1)})
        self.elsewhere("add", list(args[:2]))
        return None

    def _matmul(
        self, x: Tensor, matrix: Label | None, bias: Tensor | None, tensors: list[Tensor], out: Tensor
    ) -> Label | None:
        """x @ M [+ bias], with M [in, out] a parameter or the transpose of one."""
        label = self.label(x)
        if not isinstance(matrix, Parameter):
            self.elsewhere("a product with something that is not a weight", tensors)
            return None
        reads, writes = (-1, -2) if matrix.transposed else (-2, -1)
        if isinstance(label, Stream):
            raise self.refuse(f"{matrix.name} reads the residual stream without a norm before it")
        if isinstance(label, Normed):
            self.read(matrix.name, Reader(label.gain, reads))
        else:
            self._use(label)
        if out.shape[-1] != self.hidden_size:
            return None
        axes = {(matrix.name, writes)}
        if bias is not None:
            given = self.label(bias)
            if not isinstance(given, Parameter):
                return None
            axes.add((given.name, -1))
        return Written(frozenset(axes))

    def read(self, name: str, reader: Reader) -> None:
        known = self.roles.readers.setdefault(name, reader)
        if known != reader:
            raise self.refuse(f"{name} is applied to the outputs of two norms")

    def _write(self, written: Written) -> None:
        for name, axis in written.axes:
            if self.roles.writers.setdefault(name, axis) != axis:
                raise self.refuse(f"{name} is added to the residual stream in two ways")

    def _use(self, label: Label | None) -> None:
        if isinstance(label, Written):
            self.used |= {name for name, _ in label.axes}

    def elsewhere(self, what: str, tensors: list[Tensor], *labels: Label | None) -> None:
        """An operation that a rotation does not pass."""
        for label in (*labels, *(self.label(t) for t in tensors)):
            if isinstance(label, Stream):
                raise self.refuse(f"the residual stream goes into {what}, not only into norms and sums")
            if isinstance(label, Normed):
                raise self.refuse(f"the output of the norm {label.gain} goes into {what}, not only into weights")
            self._use(label)

    def end(self) -> None:
        both = sorted(self.used & self.roles.writers.keys())
        if both:
            raise self.refuse(f"{both[0]} is added to the residual stream and goes elsewhere as well")
