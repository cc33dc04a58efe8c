"""A whole model in memory from any source, for evaluation and for text the model writes itself; and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..formats.base import Source
from ..formats.errors import FormatError
from .skeleton import Skeleton


def load_model(source: Source, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """The source's transformers model in `dtype` (None: the checkpoint's own) on `device` (None: the CPU), in eval
    mode."""
    skeleton = Skeleton(source)
    if device is not None:
        skeleton.use(device)
    for block in [*range(len(skeleton.blocks)), None]:
        part = skeleton.parameters_of(block)
        skeleton.load(part)
        if dtype is not None:
            skeleton.cast(part, dtype)
    skeleton.model.tie_weights()
    return skeleton.model.requires_grad_(False).eval()


def load_tokenizer(source: Source) -> Any:
    """The source's tokenizer, by way of a temporary folder for sources that are one file. FormatError without."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        names = source.write_sidecar(Path(folder))
        if not any("token" in name or "vocab" in name for name in names):  # transformers would make up an empty one
            raise FormatError(f"{source.path}: has no tokenizer; copy the files of its tokenizer beside config.json")
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # the tokenizers library raises Exception itself for a file that it cannot parse
            raise FormatError(f"{source.path}: no tokenizer can be made from its files: {error}") from error
