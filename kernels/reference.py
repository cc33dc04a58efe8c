"""The kernel that supports everything: decode with the codec, then matmul. Weights stay in canonical layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .base import Packed, codec_fields
from .rows import decode_rows, row_blocks


class ReferenceKernel:
    name = "reference"
    rank = 1000
    canonical = True

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return None

    def prepare(self, qt: QuantizedTensor) -> Packed:
        shape = (qt.shape[0], qt.shape[1])
        return Packed(qt.scheme, shape, {name: qt.fields[name] for name in codec_fields(qt.scheme, shape)})

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return QuantizedTensor(packed.scheme, packed.shape, dict(packed.tensors))

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Row block by row block, so that the decoded temporary stays bounded."""
        qt = self.unprepare(packed)
        out_features, in_features = packed.shape
        compute = matmul_dtype(x)
        z = x.to(compute)
        parts = [
            z @ decode_rows(qt, slice(start, stop)).to(compute).T
            for start, stop in row_blocks(out_features, in_features)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return (y if bias is None else y + bias.to(compute)).to(x.dtype)

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        return decode_rows(self.unprepare(packed), index)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """float32 on a CPU, where few have 16-bit matmuls and the weight was decoded to float32 anyway; else x's own."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


KERNEL = ReferenceKernel()
