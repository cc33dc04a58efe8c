"""Hidden states through a model, one block at a time.

The model's own forward prepares what every block gets beside its hidden states (masks, positions, rotary tables): it
runs once over the calibration tokens with a recorder in place of every block. From then on only blocks run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .plan import PlanError
from .skeleton import Skeleton

BATCH_TOKENS = 2048
"""Tokens of one forward: enough for full speed of the matrix products, little memory."""


class _Done(Exception):
    """The forward has got as far as it is wanted."""


class Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with, passes its hidden states on."""

    def __init__(self, block: nn.Module, stop: bool, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its parameters are not ours
        self.stop, self.returns_tuple = stop, returns_tuple
        self.hidden: Tensor | None = None
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self.hidden, self.call = hidden, (args, kwargs)
        if self.stop:
            raise _Done
        if self.replacement is not None:
            hidden = self.replacement
        return (hidden,) if self.returns_tuple else hidden


@dataclass
class Stream:
    """The calibration set on its way through the model.

    hidden: list of [batch, seq_len, hidden_size], input of the next block, on the CPU: a device holds one batch at a
    time. calls: for each batch, for each block, the other arguments (shared between batches of one size), on `device`,
    where blocks run.
    """

    hidden: list[Tensor]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
    device: torch.device

    def run(self, block: nn.Module, index: int, keep: bool) -> None:
        """All batches through one block; keep: the outputs become the hidden states."""
        for i, hidden in enumerate(self.hidden):
            args, kwargs = self.calls[i][index]
            out = block(hidden.to(self.device), *args, **kwargs)
            if keep:
                self.hidden[i] = (out[0] if isinstance(out, tuple) else out).cpu()


@contextlib.contextmanager
def recorders_in(skeleton: Skeleton, stop: bool, returns_tuple: bool) -> Iterator[list[Recorder]]:
    """Recorders in place of all blocks while the context lasts. stop: the last one ends the forward. returns_tuple:
    they return (hidden states,) instead of hidden states."""
    last = len(skeleton.blocks) - 1
    recorders = [Recorder(b, stop and i == last, returns_tuple) for i, (_, b) in enumerate(skeleton.blocks)]
    try:
        for (name, _), recorder in zip(skeleton.blocks, recorders, strict=True):
            skeleton.model.set_submodule(name, recorder)
        yield recorders
    finally:
        for name, block in skeleton.blocks:
            skeleton.model.set_submodule(name, block)


def start(
    skeleton: Skeleton,
    tokens: Tensor,
    dtype: torch.dtype,
    batch_tokens: int | None = None,
    replaced: Mapping[str, Tensor] = MappingProxyType({}),
) -> Stream:
    """Hidden states at the first block's input, for tokens int64 [sequences, seq_len]. Loads what stands before it, on
    the skeleton's device. batch_tokens: of one batch, at most (None: BATCH_TOKENS); a batch is one sequence at least.
    replaced: other values of some of its parameters."""
    outer = skeleton.parameters_of(None)
    batches = list(tokens.split(max(1, (batch_tokens or BATCH_TOKENS) // tokens.shape[1])))
    stream = Stream([], [], skeleton.device)
    shared: dict[int, list[Any]] = {}
    with skeleton.loaded(outer), torch.no_grad():
        for name, value in replaced.items():
            skeleton.put(name, value)
        skeleton.cast(outer, dtype)
        for batch in batches:
            recorders = _record(skeleton, batch.to(skeleton.device))
            hidden = recorders[0].hidden
            assert hidden is not None
            stream.hidden.append(hidden.cpu())
            calls = [r.call for r in recorders]
            known = shared.setdefault(batch.shape[0], calls)
            stream.calls.append(known if _same(known, calls) else calls)
    return stream


def _same(a: Any, b: Any) -> bool:
    """Whether blocks are called with equal arguments. Masks and positions are; some models pass more, by the tokens."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, (bool, int, float, str)) and a == b


def _record(skeleton: Skeleton, batch: Tensor) -> list[Recorder]:
    """One forward with recorders. Blocks of most models return hidden states, of some a tuple that begins with them:
    where the second block would get something else than the first, it is a tuple."""
    name = type(skeleton.model).__name__
    for returns_tuple in (False, True):
        with recorders_in(skeleton, True, returns_tuple) as recorders:
            try:
                run_model(skeleton.model, batch)
            except _Done:
                pass
            except (AttributeError, TypeError, IndexError, ValueError, RuntimeError):
                if returns_tuple:
                    raise
                continue
        first = recorders[0].hidden
        assert first is not None
        if all(r.hidden is not None and r.hidden.shape == first.shape for r in recorders):
            if any(isinstance(v, Cache) for r in recorders for v in (*r.call[0], *r.call[1].values())):
                raise PlanError(
                    f"{name}: keeps a cache even if told not to; use --solver rtn, which needs no statistics"
                )
            return recorders
    raise PlanError(
        f"{name}: its blocks do not pass hidden states from one to the next; use --solver rtn, which needs no "
        "statistics"
    )


def run_model(model: nn.Module, batch: Tensor) -> Any:
    """One forward over token ids int64 [batch, seq_len], without a cache; returns what the model does."""
    takes = inspect.signature(model.forward).parameters
    return model(input_ids=batch, **({"use_cache": False} if "use_cache" in takes else {}))


class _Catcher(nn.Module):
    """Stands in for the head: keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        raise _Done


def head_inputs(
    skeleton: Skeleton,
    tokens: Tensor,
    stream: Stream,
    head: str,
    dtype: torch.dtype,
    replaced: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[Tensor]:
    """The input of the linear module `head`, batch by batch on the skeleton's device, once the stream is through all
    blocks. replaced: other values of some parameters outside of them."""
    outer = skeleton.parameters_of(None)
    module = skeleton.model.get_submodule(head)
    with skeleton.loaded(outer), torch.no_grad():
        for name, value in replaced.items():
            skeleton.put(name, value)
        skeleton.cast(outer, dtype)
        for returns_tuple in (False, True):
            try:
                for batch, hidden in zip(tokens.split(stream.hidden[0].shape[0]), stream.hidden, strict=True):
                    there = batch.to(skeleton.device), hidden.to(skeleton.device)
                    yield _head_input(skeleton, *there, head, module, returns_tuple)
                return
            except (AttributeError, TypeError, IndexError, ValueError):
                if returns_tuple:
                    raise


def _head_input(
    skeleton: Skeleton, batch: Tensor, hidden: Tensor, head: str, module: nn.Module, returns_tuple: bool
) -> Tensor:
    catcher = _Catcher()
    skeleton.model.set_submodule(head, catcher)
    try:
        with recorders_in(skeleton, False, returns_tuple) as recorders:
            recorders[-1].replacement = hidden
            with contextlib.suppress(_Done):
                run_model(skeleton.model, batch)
    finally:
        skeleton.model.set_submodule(head, module)
    return catcher.seen[0]
