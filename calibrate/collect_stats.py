"""Statistics of the original model for a folder (calibrate/store.py): one pass of the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.base import Source
from ..formats.errors import FormatError
from . import stream as streaming
from .collect import Moment, collecting, finished
from .skeleton import Skeleton
from .store import LayerStats, StatsStore
from .stream import Stream
from .structure import Weight
from .text import Calibration, self_written, sequences
from .whole import load_model, load_tokenizer


def calibration_tokens(source: Source, calibration: Calibration, skeleton: Skeleton, dtype: torch.dtype) -> Tensor:
    """int64 [sequences, seq_len] on the CPU. FormatError where the tokenizer is not the model's."""
    if calibration.text == "self":
        with torch.no_grad():
            tokens = self_written(calibration, load_model(source, dtype, skeleton.device))
    else:
        tokens = sequences(calibration, load_tokenizer(source))
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= vocabulary:
        raise FormatError(f"{source.path}: the tokenizer gives token {int(tokens.max())}, the model has {vocabulary}")
    return tokens


def missing_parts(store: StatsStore, skeleton: Skeleton) -> list[int]:
    """Parts that the folder lacks: blocks by their number, then the head."""
    return [part for part in range(len(skeleton.blocks) + 1) if not store.has(part)]


def collect_statistics(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    store: StatsStore,
    tokens: Tensor,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """What the folder lacks, for every layer that could ever need it."""
    missing = missing_parts(store, skeleton)
    if not missing:
        return
    stream = streaming.start(skeleton, tokens, dtype)
    blocks = len(skeleton.blocks)
    for index in range(blocks):
        names = skeleton.parameters_of(index)
        block = skeleton.blocks[index][1]
        with skeleton.loaded(names), torch.no_grad():
            skeleton.cast(names, dtype)
            if index in missing:
                with collecting(skeleton.model, {n: weights[n] for n in names if n in weights}) as m:
                    stream.run(block, index, keep=False)
                store.save(index, finished(m))
            stream.run(block, index, keep=True)
        progress(index + 1, blocks + 1)
    heads = [n for n, w in weights.items() if w.head]
    store.save(blocks, head_stats(skeleton, weights, heads, tokens, stream, dtype))
    progress(blocks + 1, blocks + 1)


def head_stats(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    heads: list[str],
    tokens: Tensor | None,
    stream: Stream | None,
    dtype: torch.dtype,
) -> dict[str, LayerStats]:
    """Of the head, once the stream is through all blocks; nothing without heads or without a stream."""
    if not heads or stream is None or tokens is None:
        return {}
    moment = Moment(weights[heads[0]].shape[1], skeleton.device)
    for x in streaming.head_inputs(skeleton, tokens, stream, head_module(skeleton.model), dtype):
        moment.add(x)
    return {heads[0]: moment.stats()}


def head_module(model: Any) -> str:
    """Name of the module that gives the logits."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
