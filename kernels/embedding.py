"""An embedding whose table is packed: only the rows that are asked for are decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.transform import get_transform
from .base import Kernel
from .module import QuantModule
from .registry import kernels
from .torch_ops import embedding


class QuantEmbedding(QuantModule):
    """In place of nn.Embedding: rows of a quantized table [num_embeddings, embedding_dim].

    Buffers as in QuantLinear. `dtype` is that of the rows it gives, and follows `.to(dtype)`. embed_scale: the rows
    are multiplied by it, rounded to `dtype` first, as Gemma does. The table is frozen.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        scheme: Scheme,
        embed_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.embed_scale = embed_scale
        self.dtype = dtype or torch.get_default_dtype()
        self._serves_linear = False
        self._declare("weight", scheme, (num_embeddings, embedding_dim), device)

    @classmethod
    def from_tensor(
        cls,
        qt: QuantizedTensor,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantEmbedding:
        """An embedding that holds the fields of a two-dimensional qt, without a copy."""
        layer = cls(qt.shape[0], qt.shape[1], padding_idx, qt.scheme, embed_scale, "meta", dtype)
        layer._fill("weight", qt)
        return layer

    @property
    def scheme(self) -> Scheme:
        return self._schemes["weight"]

    def serve_linear(self) -> None:
        """A tied head computes from this table: choose the kernel for its matmul. Rows are gathered from any layout."""
        self.unprepare()
        self._serves_linear = True

    def _choose(self, weight: str, device: torch.device) -> Kernel:
        kernel = super()._choose(weight, device)
        # gathering alone gains nothing from another layout
        return kernel if self._serves_linear or kernel.canonical else kernels()["reference"]

    def to_tensor(self) -> QuantizedTensor:
        """The table in canonical layout."""
        return self._canonical("weight")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table [num_embeddings, embedding_dim], transforms undone."""
        return self.to_tensor().dequantize(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows [..., embedding_dim] in `dtype` for integer ids of any shape. IndexError for an id out of range."""
        if is_compiling():
            return embedding(input_ids, self._key, self.embedding_dim, self.dtype)
        return self.look_up(input_ids)

    @torch.no_grad()
    def look_up(self, input_ids: Tensor) -> Tensor:
        if input_ids.device.type == "meta":
            return torch.empty(*input_ids.shape, self.embedding_dim, dtype=self.dtype, device="meta")
        kernel, packed = self._ready("weight")
        ids = input_ids.reshape(-1).to(torch.int64)
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(
                f"ids from {int(ids.min())} to {int(ids.max())}: the table has rows 0 to {self.num_embeddings - 1}"
            )
        rows = kernel.rows(packed, ids)
        fields = self._transform_fields("weight")
        for name in reversed(self.scheme.transforms):
            rows = get_transform(name).undo_weight(rows, fields)
        rows = rows.to(self.dtype)
        if self.embed_scale is not None:
            rows = rows * torch.tensor(self.embed_scale, dtype=self.dtype, device=rows.device)
        return rows.view(*input_ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}, dtype={self.dtype}"
