"""Reading and decoding some rows of one tensor of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .gguf_header import GgufTensor
from .safetensors_file import read_exactly


def decode_rows(path: Path, tensor: GgufTensor, first: int, last: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [last - first, columns] of the tensor seen as rows of its last dimension. FormatError: it shrank."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = torch.empty((last - first) * tensor.row_bytes, dtype=torch.uint8)
    read_exactly(path, tensor.offset + first * tensor.row_bytes, raw, tensor.name)
    with np.errstate(all="ignore"):  # a corrupt scale may overflow; the result says so by not being finite
        rows = dequantize(raw.numpy().reshape(last - first, -1), GGMLQuantizationType(tensor.qtype))
    return np.asarray(rows, dtype=np.float32).reshape(last - first, tensor.shape[-1])
