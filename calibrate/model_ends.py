"""What stands before and behind a model's blocks, run for itself: tokens -> first hidden states, last hidden states ->
logits, both with gradients where wanted.

The model's own forward does it, with a recorder in place of every block, so that whatever an architecture does there
(scaled embeddings, soft caps, projections) is done. Logits come some tokens at a time: a vocabulary is 50 to 400 times
as wide as the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .plan import PlanError
from .skeleton import Skeleton
from .stream import Recorder, recorders_in, run_model

CHUNK_LOGITS = 1 << 23
"""Logits computed at a time: 32 MiB in float32, of which softmax, gradient and cumulated sums need copies."""

WAY_OUT = "use --uniform or name a --codec, which need no sensitivities"


class _Enough(Exception):
    """The forward has got as far as it is wanted."""


class _Head(nn.Module):
    """Stands in for the head: computes logits of the tokens `rows` only, cut off from the graph on both sides."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["head"] = head  # not a submodule: its parameters are not ours
        self.rows: slice | None = None
        self.input: Any = None
        self.part: Any = None
        self.raw: Any = None
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["head"], name)

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        if self.rows is None or x.ndim != 3:
            raise _Enough
        self.part = x[:, self.rows].detach().requires_grad_()
        self.raw = self.__dict__["head"](self.part)
        self.output = self.raw.detach().requires_grad_()
        return self.output


@dataclass(frozen=True)
class Logits:
    """Logits of some tokens of one sequence.

    value: [tokens, vocabulary], what the model gives. rows: which tokens. inputs: [tokens, hidden_size], the head's.
    all_inputs: [1, seq_len, hidden_size], the head's for all tokens, with the graph that leads to them.
    """

    value: Tensor
    rows: slice
    inputs: Tensor
    all_inputs: Tensor
    _raw: Tensor
    _part: Tensor
    _output: Tensor

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient by `value` -> gradients by the head's output and by its input, [tokens, ...]."""
        (by_output,) = torch.autograd.grad(self.value, self._output, gradient.to(self.value.dtype))
        (by_input,) = torch.autograd.grad(self._raw, self._part, by_output)
        return by_output[0], by_input[0]


class Ends:
    """Embeddings, final norm and head of a skeleton, in memory in `dtype` while the context lasts.

    PlanError where the model cannot be taken apart so.
    """

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype) -> None:
        self.skeleton, self.dtype = skeleton, dtype
        self.model = skeleton.model
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
            raise PlanError(f"{type(self.model).__name__}: has no head or no embeddings of its own; {WAY_OUT}")
        self.head, self.embedding = head, embedding
        self.head_name = next(name for name, module in self.model.named_modules() if module is head)
        self._returns_tuple: bool | None = None
        self._names: list[str] = []

    def __enter__(self) -> Ends:
        self._names = self.skeleton.parameters_of(None)
        self.skeleton.load(self._names)
        self.skeleton.cast(self._names, self.dtype)
        for name, other in self.skeleton.tied.items():
            if other in self._names:
                self.skeleton.put(name, self.skeleton.get(other))
        self.model.requires_grad_(False)
        with torch.no_grad():  # settles how blocks are stood in for
            self.first_hidden(torch.zeros(1, 2, dtype=torch.int64, device=self.skeleton.device))
        return self

    def __exit__(self, *_: object) -> None:
        self.skeleton.release(self._names)
        for name, other in self.skeleton.tied.items():
            if other in self._names:
                self.skeleton.put(name, self.skeleton.parameters[other])

    def first_hidden(self, sequence: Tensor) -> Tensor:
        """Tokens int64 [1, seq_len] -> the first block's input. PlanError where blocks are also given other things
        that depend on the embeddings: gradients would miss them. Only under torch.enable_grad can that be seen."""
        recorders = self._run(sequence, None, _Head(self.head))[1]
        if any(t.requires_grad for r in recorders for t in _tensors(r.call)):
            raise PlanError(
                f"{type(self.model).__name__}: its blocks are given more that depends on the embeddings than hidden "
                f"states; {WAY_OUT}"
            )
        hidden = recorders[0].hidden
        assert hidden is not None
        return hidden

    def logits(self, sequence: Tensor, hidden: Tensor) -> Iterator[Logits]:
        """Tokens int64 [1, seq_len] and the last block's output -> logits, some tokens at a time."""
        vocabulary = self.skeleton.parameters[self._head_parameter()].shape[0]
        step = max(1, CHUNK_LOGITS // vocabulary)
        for start in range(0, sequence.shape[1], step):
            head = _Head(self.head)
            head.rows = slice(start, min(start + step, sequence.shape[1]))
            out, _ = self._run(sequence, hidden, head)
            value = out.logits if hasattr(out, "logits") else out[0]
            yield Logits(value[0], head.rows, head.part[0].detach(), head.input, head.raw, head.part, head.output)

    def _head_parameter(self) -> str:
        name = f"{self.head_name}.weight"
        return self.skeleton.tied.get(name, name)

    def _run(self, sequence: Tensor, hidden: Tensor | None, head: _Head) -> tuple[Any, list[Recorder]]:
        """One forward with `head` in the head's place; blocks pass their input on, the last gives `hidden`."""
        for returns_tuple in (False, True) if self._returns_tuple is None else (self._returns_tuple,):
            out = None
            self.model.set_submodule(self.head_name, head)
            try:
                with recorders_in(self.skeleton, False, returns_tuple) as recorders:
                    recorders[-1].replacement = hidden
                    with contextlib.suppress(_Enough):
                        out = run_model(self.model, sequence)
            except (AttributeError, TypeError, IndexError, ValueError, RuntimeError):
                if returns_tuple:
                    raise
                continue
            finally:
                self.model.set_submodule(self.head_name, self.head)
            first, x = recorders[0].hidden, head.input
            same = first is not None and all(r.hidden is not None and r.hidden.shape == first.shape for r in recorders)
            if same and x is not None and x.ndim == 3 and x.shape[:2] == sequence.shape:
                self._returns_tuple = returns_tuple
                return out, recorders
        raise PlanError(
            f"{type(self.model).__name__}: cannot be run as embeddings, {len(self.skeleton.blocks)} blocks and a head "
            f"of their own; {WAY_OUT}"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
