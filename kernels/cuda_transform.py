"""The transforms of a layer's input on a GPU, by csrc/cuda/transform_input.cuh, and int8 forms of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant.hartley import hartley_matrix, odd_part
from ..quant.native import DTYPES
from ..quant.order import unpack_order
from .native_cuda import cuda_module, current_stream, shared_limit
from .tile_codes import padded

MOST_ODD = 1024
_HARTLEY_ROW = 16
SAME, INT8, PLANES = 0, 1, 2


@dataclass(frozen=True)
class Int8Input:
    """Activations as the int8 kernels want them, every four columns in the order 0, 2, 1, 3, zeros beyond `in`.

    codes int8 [tokens, KP], low likewise or None; scale float32 [tokens]; sum int32 [tokens].
    """

    codes: Tensor
    low: Tensor | None
    scale: Tensor
    sum: Tensor


class CudaTransform:
    """The transforms of one layer, or none of them, for inputs of `in_features` columns on `device`."""

    def __init__(self, names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int, device: torch.device):
        self.in_features, self.names = in_features, names
        rotate = "rotate" in names
        odd = odd_part(in_features)[0]
        with torch.inference_mode(False), torch.no_grad():
            self._tensors = {
                "factors": fields["input_scale"].float().reciprocal() if "scale" in names else None,
                "signs": fields["signs"] if rotate else None,
                "hartley": _hartley(odd, device) if rotate and odd > 1 else None,
                "order": unpack_order(fields["order"], in_features).int() if "order" in names else None,
            }
        kept = {name: None if t is None else t.to(device).contiguous() for name, t in self._tensors.items()}
        self._tensors = kept
        factors, signs, hartley, order = (0 if t is None else t.data_ptr() for t in kept.values())
        self._native = cuda_module().Transform(in_features, factors, signs, rotate, hartley, order)

    def apply(self, x: Tensor) -> Tensor:
        """T x [tokens, KP] in the dtype of x [tokens, in], zeros beyond `in`."""
        y = torch.empty(x.shape[0], padded(self.in_features), dtype=x.dtype, device=x.device)
        self._run(x, SAME, y)
        return y

    def quantize(self, x: Tensor, planes: bool) -> Int8Input:
        """T x in int8, one scale a token; planes: a second int8 for what the first leaves."""
        tokens, stride = x.shape[0], padded(self.in_features)
        codes = torch.empty(tokens, stride, dtype=torch.int8, device=x.device)
        low = torch.empty_like(codes) if planes else None
        scale = torch.empty(tokens, device=x.device)
        total = torch.empty(tokens, dtype=torch.int32, device=x.device)
        self._run(x, PLANES if planes else INT8, codes, low, scale, total)
        return Int8Input(codes, low, scale, total)

    def _run(self, x: Tensor, output: int, y: Tensor, *rest: Tensor | None) -> None:
        tokens, n = x.shape
        if n != self.in_features:
            raise ValueError(f"the transform takes {self.in_features} columns, got {list(x.shape)}")
        x = x if x.stride(1) == 1 else x.contiguous()
        room, limit = cuda_module().transform_room(n), shared_limit(x.device)
        scratch = torch.empty(tokens, room, device=x.device) if 4 * room + 1024 > limit else None
        low, scale, total = (0 if t is None else t.data_ptr() for t in (*rest, *[None] * (3 - len(rest))))
        cuda_module().transform_input(
            self._native,
            x.data_ptr(),
            x.stride(0),
            tokens,
            DTYPES[x.dtype],
            output,
            y.data_ptr(),
            low,
            scale,
            total,
            y.shape[1],
            0 if scratch is None else scratch.data_ptr(),
            limit,
            current_stream(x.device),
        )


def why_not_transform(names: tuple[str, ...], in_features: int) -> str | None:
    """None where the kernel has all these transforms for this width, else the reason in words."""
    unknown = [name for name in names if name not in ("scale", "rotate", "order")]
    if unknown:
        return f"the transform {unknown[0]!r} has no CUDA form"
    if list(names) != [name for name in ("scale", "rotate", "order") if name in names]:
        return f"the transforms {list(names)} come in another order than the kernel's"
    if "rotate" in names and odd_part(in_features)[0] > MOST_ODD:
        return f"a rotation of {in_features} columns has an odd part above {MOST_ODD}, where torch's FFT is faster"
    return None


def _hartley(odd: int, device: Any) -> Tensor:
    """DHT_p, float32 [p, p rounded up to 16]."""
    return torch.nn.functional.pad(hartley_matrix(odd, 0, torch.device(device)), (0, -odd % _HARTLEY_ROW))
