"""Which weights read the residual stream and which write to it, found by watching the model compute.

No list of architectures: the forward runs once without weights (outside the blocks with zeros for activations, inside
them on the meta device) and every operation is looked at (`trace.py`). A rotation T of the stream commutes with RMS
norms without gain. So it can be folded into the weights beside the stream (as in SliceGPT, Ashkboos et al. 2024, and
QuaRot) exactly if the stream is only summed up and normed, and what norms give is only read by weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from ..quant.hartley import hartley_hadamard
from .skeleton import Skeleton
from .stream import Recorder, recorders_in, run_model
from .structure import is_experts
from .trace import Foreign, Normed, Parameter, Reader, Roles, Stream, Trace, Unfoldable, Written

TOKENS = 8
"""Length of the sequence that is traced, and of the one that folds are checked with."""


@dataclass
class Residual(Roles):
    """hidden_size: width of the stream. embedding, head: parameters; head is None where it is tied to the embedding.
    head_module: name of the module that gives the logits. final_gain: gain of the norm before the head. readers: the
    head's weight among them, if it is its own. writers: {weight or bias: axis that is added to the stream}, the
    embedding included. gains: {gain of a norm: the value that means 1}. calls: what every block was called with beside
    its hidden states [1, TOKENS, hidden_size]."""

    hidden_size: int = 0
    embedding: str = ""
    head: str | None = None
    head_module: str = ""
    final_gain: str = ""
    gains: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def trace_residual(skeleton: Skeleton) -> Residual:
    """Find the readers and writers, from the architecture alone. Raises Unfoldable."""
    found = _ends(skeleton)
    with torch.no_grad():
        _trace_outside(skeleton, found)
        for index in range(len(skeleton.blocks)):
            _trace_block(skeleton, found, index)
    return found


# -- stand-ins


class _StandIn(nn.Module):
    """In place of a module while the forward is traced; anything asked of it that it lacks is the module's."""

    def __init__(self, module: nn.Module, name: str, trace: Trace, found: Residual) -> None:
        super().__init__()
        # no submodule: parameters keep their names
        self.__dict__.update(module=module, name=name, trace=trace, found=found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _Norm(_StandIn):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        label = self.trace.label(x)
        if isinstance(label, Stream):
            gain = f"{self.name}.weight"
            self.found.gains[gain] = _unit_gain(self.module, self.name)
            return self.trace.put(torch.zeros_like(x), Normed(gain))
        out = self.module(x, *args, **kwargs)
        if isinstance(label, Written):
            self.trace.put(out, Foreign(f"{self.name} is a norm of what is added to the residual stream"))
        return out


class _Experts(_StandIn):
    """Experts compute from the tokens routed to them, which needs numbers; what they read and write is known."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        label = self.trace.label(x)
        if isinstance(label, Stream):
            raise self.trace.refuse(f"{self.name} reads the residual stream without a norm before it")
        if isinstance(label, Normed):
            self.trace.read(f"{self.name}.gate_up_proj", Reader(label.gain, -1))
        else:
            self.trace.elsewhere("experts", [x])
        self.trace.elsewhere("the choice of experts", [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        return self.trace.put(torch.zeros_like(x), Written(frozenset({(f"{self.name}.down_proj", -2)})))


class _Embedding(_StandIn):
    def forward(self, ids: Tensor) -> Tensor:
        weight = self.module.weight
        return self.trace.put(torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=ids.device), Stream())


class _Head(_StandIn):
    def forward(self, x: Tensor) -> Tensor:
        label = self.trace.label(x)
        if not isinstance(label, Normed):
            raise self.trace.refuse(f"the head {self.name} does not read the output of a norm of the residual stream")
        self.found.final_gain = label.gain
        return x.new_zeros(*x.shape[:-1], self.module.weight.shape[0])


@contextlib.contextmanager
def _in_place(model: nn.Module, stand_ins: dict[str, nn.Module]) -> Iterator[None]:
    modules = {name: model.get_submodule(name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            model.set_submodule(name, stand_in)
        yield
    finally:
        for name, module in modules.items():
            model.set_submodule(name, module)


def _may_be_norm(module: nn.Module, hidden_size: int) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(tuple(p.shape) == (hidden_size,) for p in own.values())


def _unit_gain(module: nn.Module, name: str) -> float:
    """The value of the parameter `weight` that means a gain of 1: 1, or 0 where the gain is 1 + weight (Gemma).

    Tried with numbers: the module must be x / rms(x) * gain, that is commute with a rotation when the gain is 1.
    """
    if len(list(module.parameters())) > 1:
        raise Unfoldable(f"the norm {name} ({type(module).__name__}) has a bias")
    weight = module.get_parameter("weight")
    n = weight.shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    x, gain = (torch.randn(*size, generator=generator, device="cpu") for size in ((4, n), (n,)))
    x = x + 1  # a norm that takes the mean away must show

    def norm(values: Tensor, w: Tensor) -> Tensor:
        return probe_weight(module, w)(values)

    unit = 0.0 if bool(norm(x, torch.zeros_like(gain)).any()) else 1.0
    neutral = torch.full_like(gain, unit)
    plain, scaled, rotated = norm(x, neutral), norm(x, gain), norm(hartley_hadamard(x), neutral)
    for got, want in ((rotated, hartley_hadamard(plain)), (scaled, plain * (gain + 1 - unit))):
        if not bool(((got - want).norm() <= 1e-4 * want.norm()).item()):
            raise Unfoldable(f"the norm {name} ({type(module).__name__}) is not an RMS norm")
    return unit


def probe_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a module whose only parameter is `weight`, with another weight."""
    probe = copy.deepcopy(module)
    probe.weight = nn.Parameter(weight, requires_grad=False)
    return probe


# -- the parts


def _ends(skeleton: Skeleton) -> Residual:
    """Embedding and head; nothing else but norms may have weights outside the blocks."""
    model = skeleton.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or not _gives_rows(table):
        raise Unfoldable(f"the input embeddings ({type(table).__name__}) do more than look up rows and scale them")
    if not isinstance(head, nn.Linear):
        raise Unfoldable(f"{type(model).__name__} has no linear head that gives logits")
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head_name = f"{names[id(table)]}.weight", f"{names[id(head)]}.weight"
    tied = skeleton.tied.get(head_name)
    if tied not in (None, embedding) or table.weight.shape[1] != head.weight.shape[1]:
        raise Unfoldable(f"the head {head_name} and the embeddings {embedding} do not go together")
    found = Residual(
        hidden_size=table.weight.shape[1],
        embedding=embedding,
        head=None if tied else head_name,
        head_module=names[id(head)],
    )
    found.writers[embedding] = -1
    for name in skeleton.parameters_of(None):
        module = model.get_submodule(name.rpartition(".")[0])
        if module is not table and module is not head and not _may_be_norm(module, found.hidden_size):
            raise Unfoldable(f"{name} stands outside the blocks and is neither embedding, norm nor head")
    return found


def _gives_rows(table: nn.Embedding) -> bool:
    """Whether a rotation of the table rotates what it gives: tried with numbers, on a table of few rows."""
    n = table.weight.shape[1]
    rows = torch.randn(5, n, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    ids = torch.tensor([3, 1, 1, 4], device="cpu")
    plain, rotated = (probe_weight(table, w)(ids) for w in (rows, hartley_hadamard(rows)))
    want = hartley_hadamard(plain)
    return table.max_norm is None and bool((rotated - want).norm() <= 1e-4 * want.norm())


def _norms(found: Residual, module: nn.Module, prefix: str, trace: Trace) -> dict[str, nn.Module]:
    named = ((f"{prefix}{name}", m) for name, m in module.named_modules() if name)
    return {name: _Norm(m, name, trace, found) for name, m in named if _may_be_norm(m, found.hidden_size)}


def _trace_outside(skeleton: Skeleton, found: Residual) -> None:
    """What stands before the first block and behind the last; blocks are taken for ones that return tensors, then for
    ones that return tuples."""
    try:
        recorders = _run_outside(skeleton, found, returns_tuple=False)
    except (Unfoldable, AttributeError, TypeError, IndexError, ValueError, RuntimeError) as first:
        try:
            recorders = _run_outside(skeleton, found, returns_tuple=True)
        except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
            if isinstance(first, Unfoldable):
                raise first from error
            raise Unfoldable(f"{type(skeleton.model).__name__} cannot be traced: {_line(error)}") from error
    if not found.final_gain:
        raise Unfoldable(f"the head {found.head_module} is not called")
    found.calls = [recorder.call for recorder in recorders]
    if found.head is not None:
        found.readers[found.head] = Reader(found.final_gain, -1)


def _run_outside(skeleton: Skeleton, found: Residual, returns_tuple: bool) -> list[Recorder]:
    trace = Trace(found, found.hidden_size, "outside the blocks")
    inside = tuple(f"{name}." for name, _ in skeleton.blocks)
    norms = {k: v for k, v in _norms(found, skeleton.model, "", trace).items() if not k.startswith(inside)}
    table, head = found.embedding.rpartition(".")[0], found.head_module
    stand_ins: dict[str, nn.Module] = {
        **norms,
        table: _Embedding(skeleton.model.get_submodule(table), table, trace, found),
        head: _Head(skeleton.model.get_submodule(head), head, trace, found),
    }
    with _in_place(skeleton.model, stand_ins), recorders_in(skeleton, False, returns_tuple) as recorders, trace:
        run_model(skeleton.model, torch.ones(1, TOKENS, dtype=torch.int64, device="cpu"))
    streams = [isinstance(trace.label(recorder.hidden), Stream) for recorder in recorders]
    passed = [t for r in recorders for t in tree_leaves(r.call) if isinstance(t, Tensor)]
    if not all(streams):
        raise trace.refuse(f"block {streams.index(False)} is not called with the residual stream")
    if any(trace.label(t) is not None for t in passed):
        raise trace.refuse("blocks are called with more than one tensor made from the residual stream")
    return recorders


def _trace_block(skeleton: Skeleton, found: Residual, index: int) -> None:
    prefix, block = skeleton.blocks[index]
    trace = Trace(found, found.hidden_size, prefix)
    for name, parameter in block.named_parameters():
        trace.put(parameter, Parameter(f"{prefix}.{name}"))
    experts = {f"{prefix}.{name}": m for name, m in block.named_modules() if name and is_experts(m)}
    stand_ins: dict[str, nn.Module] = _norms(found, block, f"{prefix}.", trace)
    stand_ins |= {name: _Experts(m, name, trace, found) for name, m in experts.items()}
    args, kwargs = tree_map(_to_meta, found.calls[index])
    hidden = torch.zeros(1, TOKENS, found.hidden_size, dtype=skeleton.get(found.embedding).dtype, device="meta")
    buffers = {name: _to_meta(buffer) for name, buffer in block.named_buffers()}
    with _in_place(skeleton.model, stand_ins):
        try:
            with trace:
                out = functional_call(block, buffers, (trace.put(hidden, Stream()), *args), kwargs)
        except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
            raise Unfoldable(f"{prefix} cannot be traced: {_line(error)}") from error
    if not isinstance(trace.label(out[0] if isinstance(out, tuple) else out), Stream):
        raise trace.refuse("what it returns is not the residual stream")
    trace.end()


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
