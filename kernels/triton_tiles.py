"""The Triton kernels over packed tiles: what the CUDA kernels do, on any GPU that Triton serves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..quant.int import IntScheme
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .base import Packed
from .tiles import pack_tiles, unpack_tiles, why_not_tiles
from .triton_activations import quantize_activations
from .triton_dense import dequantize, rows
from .triton_format import TileWeight, tile_weight
from .triton_linear import linear, linear_w4a8
from .triton_runtime import why_not_device
from .triton_transform import TritonTransform, triton_transform, why_not_transform


class TritonTilesKernel:
    name = "triton"
    rank = 30
    canonical = False

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return why_not_device(device) or why_not_tiles(scheme, shape)

    def prepare(self, qt: QuantizedTensor) -> Packed:
        return Packed(qt.scheme, (qt.shape[0], qt.shape[1]), pack_tiles(qt))

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return unpack_tiles(packed.scheme, packed.shape, packed.tensors)

    def weight(self, packed: Packed) -> TileWeight:
        if packed.handle is None:
            packed.handle = tile_weight(packed.scheme, packed.shape, packed.tensors)
        handle: TileWeight = packed.handle
        return handle

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """float32 is multiplied by the dequantized weight in float32, progressive int in int8, the rest as it comes."""
        weight, x = self.weight(packed), x.contiguous()
        bias = None if bias is None else bias.to(x.dtype)
        if x.dtype == torch.float32:
            return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
        if isinstance(packed.scheme, IntScheme) and packed.scheme.progressive:
            return linear_w4a8(*quantize_activations(x), weight, x.dtype, bias)
        return linear(x, weight, bias)

    def transformed_linear(self, x: Tensor, packed: Packed, bias: Tensor | None, transform: TritonTransform) -> Tensor:
        return self.linear(transform.apply(x.contiguous()), packed, bias)

    def why_not_transform(self, names: tuple[str, ...], in_features: int) -> str | None:
        return why_not_transform(names, in_features)

    def make_transform(self, names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int) -> TritonTransform:
        return triton_transform(names, fields, in_features, next(iter(fields.values())).device)

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        return rows(self.weight(packed), index, torch.float32)


KERNEL = TritonTilesKernel()
