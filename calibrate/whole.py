"""A whole model in memory from any source, for evaluation and for text the model writes itself."""

from __future__ import annotations

from typing import Any

import torch

from ..formats.base import Source
from .skeleton import Skeleton


def load_model(source: Source, dtype: torch.dtype | None = None) -> Any:
    """The source's transformers model on the CPU, in `dtype` (None: the checkpoint's own), in eval mode."""
    skeleton = Skeleton(source)
    names = list(skeleton.parameters)
    for block in [*range(len(skeleton.blocks)), None]:
        part = skeleton.parameters_of(block)
        skeleton.load(part)
        if dtype is not None:
            skeleton.cast(part, dtype)
    for name in names:
        skeleton.get(name).requires_grad_(False)
    skeleton.model.tie_weights()
    return skeleton.model.eval()
