"""What the original model gives: the inputs of its output head, made block by block: it is never whole in memory.

They are all that its output distribution depends on, and take the hidden size instead of the vocabulary per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.base import Source
from . import stream as streaming
from .plan import PlanError
from .skeleton import Skeleton
from .tune_state import load_state, save_state
from .tune_student import find_head

FILE = "tune-reference.safetensors"


def head_inputs_of(
    source: Source,
    tokens: Tensor,
    dtype: torch.dtype,
    folder: Path,
    key: str,
    every: float,
    progress: Callable[[int, int], None] = lambda done, blocks: None,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Of every sequence of tokens int64 [sequences, seq_len], the head's input [seq_len, hidden_size] in `dtype`, on
    the CPU; computed on `device` (None: the CPU).

    Kept in `folder` under `key`, which stands for source and tokens: at the end, and in between every `every` seconds,
    so that a killed run goes on there. PlanError for models that do not run block by block.
    """
    path = folder / FILE
    skeleton = Skeleton(source)
    if device is not None:
        skeleton.use(device)
    blocks = len(skeleton.blocks)
    head_name, _ = find_head(skeleton.model)
    kept = load_state(path)
    done, hidden = 0, []
    if kept is not None and kept[1]["key"] == key:
        done, hidden = kept[1]["blocks"], [kept[0][name] for name in sorted(kept[0])]
    if done > blocks:
        return hidden
    stream = streaming.start(skeleton, tokens, dtype)
    if done:
        stream.hidden = hidden
    saved = time.monotonic()
    for index in range(done, blocks):
        names = skeleton.parameters_of(index)
        with skeleton.loaded(names), torch.no_grad():
            skeleton.cast(names, dtype)
            stream.run(skeleton.blocks[index][1], index, keep=True)
        progress(index + 1, blocks)
        if time.monotonic() - saved >= every:
            _save(path, stream.hidden, key, index + 1)
            saved = time.monotonic()
    batches = streaming.head_inputs(skeleton, tokens, stream, head_name, dtype)
    # each in memory of its own, as those that are read from the file
    rows = [row.clone().cpu() for batch in batches for row in batch.view(-1, tokens.shape[1], batch.shape[-1])]
    if len(rows) != len(tokens):
        raise PlanError(
            f"{type(skeleton.model).__name__} gives {len(rows)} of {len(tokens)} sequences to its head; --effort best "
            "cannot compare them; use --effort normal"
        )
    _save(path, rows, key, blocks + 1)
    return rows


def _save(path: Path, hidden: list[Tensor], key: str, blocks: int) -> None:
    tensors = {f"{i:06d}": h.contiguous() for i, h in enumerate(hidden)}
    save_state(path, tensors, {"key": key, "blocks": blocks})


def original_head(source: Source, dtype: torch.dtype, device: torch.device | None = None) -> Callable[[Tensor], Tensor]:
    """The original model's output head as a function [..., hidden_size] -> [..., vocabulary], weights in `dtype` on
    `device` (None: the CPU)."""
    skeleton = Skeleton(source)
    if device is not None:
        skeleton.use(device)
    name, module = find_head(skeleton.model)
    parts: list[Tensor | None] = []
    for leaf in ("weight", "bias"):
        parameter = f"{name}.{leaf}"
        parameter = skeleton.tied.get(parameter, parameter)
        if getattr(module, leaf, None) is None:
            parts.append(None)
            continue
        with skeleton.loaded([parameter]) as loaded:
            parts.append(loaded[parameter].to(dtype))
    weight, bias = parts
    assert weight is not None

    def head(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return head
