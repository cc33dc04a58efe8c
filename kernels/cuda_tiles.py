"""The CUDA kernels over packed tiles (docs/gpu.md): 16-bit and int8 GEMMs, a GEMV for the trellis, and dequantizing.

Up to 256 tokens of fp16 or bf16, or as many as were measured to be faster so (`measured_choice`), the packed codes are
multiplied as they are; more tokens, and float32, are left to cuBLAS and the weight dequantized for the call; batch
invariant, 16-bit tokens are multiplied by the codes 256 at a time. BITPALETTE_CUDA_ACTIVATIONS says in which form
activations are multiplied: `16bit`, as they come, unless it is set; `int8`, one scale a token, where the weight's
format has a kernel for it; `exact`, two int8 a value, for a trellis and at most two tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..quant.float import FloatScheme
from ..quant.int import IntScheme
from ..quant.lut import LutScheme
from ..quant.native import DTYPES
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.trellis import TrellisScheme
from .base import KernelError, Packed
from .cuda_transform import CudaTransform, Int8Input, why_not_transform
from .measured_choice import most_tokens
from .native_cuda import (
    COUNTERS,
    PART_WORDS,
    cuda_module,
    current_stream,
    keep_spare_workspace,
    why_not_device,
    workspace,
)
from .tiles import pack_tiles, unpack_tiles, why_not_tiles

ACTIVATIONS_VARIABLE = "BITPALETTE_CUDA_ACTIVATIONS"
INVARIANT_VARIABLE = "BITPALETTE_BATCH_INVARIANT"
FORMS = ("16bit", "int8", "exact")
MOST_TOKENS = 256
"""That a GEMM takes. Where nothing was measured on this GPU, dequantizing and cuBLAS take over beyond them."""
GEMV_TOKENS = 2
TOKEN_CLASSES = (8, 16, 32, 64, 128, 256)
"""A plan is made for one of these."""

FORMATS = ("int2", "int3", "int4", "int8", "progressive", "lut2", "lut3", "lut4", "e4m3", "trellis")
"""By the number that csrc/cuda/container.cuh knows them by."""


def tile_format(scheme: Scheme) -> str:
    """The name in `FORMATS` of a scheme that `why_not_tiles` lets through."""
    if isinstance(scheme, IntScheme):
        return "progressive" if scheme.progressive else f"int{scheme.bits}"
    if isinstance(scheme, LutScheme):
        return "lut2" if scheme.entries <= 4 else "lut3" if scheme.entries <= 8 else "lut4"
    if isinstance(scheme, FloatScheme):
        return "lut4" if scheme.element == "e2m1" else "e4m3"
    return "trellis"


def activation_form() -> str:
    """What BITPALETTE_CUDA_ACTIVATIONS says, `16bit` where it is unset. KernelError for any other value."""
    value = os.environ.get(ACTIVATIONS_VARIABLE) or FORMS[0]
    if value not in FORMS:
        raise KernelError(f"{ACTIVATIONS_VARIABLE}={value} is no form of activations; use one of {', '.join(FORMS)}")
    return value


@dataclass
class CudaWeight:
    """A packed weight on a device, as bitpalette._cuda sees it, and the plans of its products."""

    native: Any
    format: str
    scheme: Scheme
    shape: tuple[int, int]
    device: torch.device
    form: str
    batch_invariant: bool
    identity: CudaTransform
    most_tokens: int = MOST_TOKENS
    plans: dict[Any, Any] = field(default_factory=dict)

    def plan(self, tokens: int, dtype: torch.dtype, int8: bool) -> Any:
        """Of the GEMM for up to so many tokens. KernelError where its workspace is larger than a stream's."""
        most = next(size for size in TOKEN_CLASSES if tokens <= size)
        plan = self.plans.get((most, dtype, int8))
        if plan is None:
            plan = self.native.plan(most, DTYPES[dtype], int8, self.batch_invariant)
            self._check(plan.part_words, plan.counters, f"GEMM of {most} tokens")
            self.plans[most, dtype, int8] = plan
        return plan

    def gemv_blocks(self, tokens: int, planes: bool) -> int:
        """Of the GEMV. KernelError where its workspace is larger than a stream's."""
        found = self.plans.get((tokens, planes))
        if found is None:
            found, sums, counters = self.native.plan_gemv(tokens, planes)
            self._check(2 * sums, counters, f"GEMV of {tokens} tokens")
            self.plans[tokens, planes] = found
        return int(found)

    def _check(self, words: int, counters: int, what: str) -> None:
        if words > PART_WORDS or counters > COUNTERS:
            raise KernelError(
                f"a {what} by {list(self.shape)} wants {words} words and {counters} counters of workspace, there are "
                f"{PART_WORDS} and {COUNTERS}: set BITPALETTE_KERNEL=triton or reference"
            )

    @property
    def int8_gemm(self) -> bool:
        """Whether the int8 GEMM has this format."""
        if not isinstance(self.scheme, IntScheme):
            return False
        return self.format in ("int4", "progressive") or (self.format == "int8" and not self.scheme.group_size)


class CudaTilesKernel:
    name = "cuda"
    rank = 20
    canonical = False

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        reason = why_not_device(device) or why_not_tiles(scheme, shape)
        if reason is not None:
            return reason
        group = getattr(scheme, "group_size", 0)
        if group & (group - 1):
            return f"needs a group_size that is a power of two, not {group}"
        return None

    def prepare(self, qt: QuantizedTensor) -> Packed:
        device = qt.fields["codes"].device
        with _on(device):
            keep_spare_workspace(device)  # now: the first call may be one that is captured
        return Packed(qt.scheme, (qt.shape[0], qt.shape[1]), pack_tiles(qt))

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return unpack_tiles(packed.scheme, packed.shape, packed.tensors)

    def weight(self, packed: Packed) -> CudaWeight:
        """What native calls take, made at the first call and kept in `packed`."""
        if packed.handle is None:
            packed.handle = _make_weight(packed)
        handle: CudaWeight = packed.handle
        return handle

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return self.transformed_linear(x, packed, bias, None)

    def transformed_linear(
        self, x: Tensor, packed: Packed, bias: Tensor | None, transform: CudaTransform | None
    ) -> Tensor:
        """y [tokens, out] = T(x) W^T + bias for x [tokens, in]."""
        weight = self.weight(packed)
        with _on(weight.device):
            if bias is not None and bias.dtype != x.dtype:
                bias = bias.to(x.dtype)
            return _product(weight, x, bias, transform)

    def why_not_transform(self, names: tuple[str, ...], in_features: int) -> str | None:
        return why_not_transform(names, in_features)

    def make_transform(self, names: tuple[str, ...], fields: Mapping[str, Tensor], in_features: int) -> CudaTransform:
        device = next(iter(fields.values())).device
        with _on(device):
            return CudaTransform(names, fields, in_features, device)

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        """float32 [n, in]; an index outside the weight is an error as in torch."""
        weight = self.weight(packed)
        out = torch.empty(index.shape[0], packed.shape[1], device=weight.device)
        index = index.to(weight.device, torch.int64).contiguous()
        torch._assert_async(((index >= 0) & (index < packed.shape[0])).all(), "a row outside the weight")
        with _on(weight.device):
            weight.native.rows(
                index.data_ptr(), len(index), out.data_ptr(), DTYPES[torch.float32], current_stream(weight.device)
            )
        return out


def _make_weight(packed: Packed) -> CudaWeight:
    scheme, shape, tensors = packed.scheme, packed.shape, packed.tensors
    device = tensors["codes"].device
    names = ("codes", "scale", "zero_point", "table", "group_scale", "group_offset")
    addresses = (tensors[name].data_ptr() if name in tensors else 0 for name in names)
    trellis = isinstance(scheme, TrellisScheme)
    format = tile_format(scheme)
    with _on(device):
        native = cuda_module().PackedWeight(
            FORMATS.index(format),
            *shape,
            getattr(scheme, "group_size", 0),
            scheme.row_bits if isinstance(scheme, TrellisScheme) else 0,
            scheme.window if trellis else 0,  # type: ignore[attr-defined]
            *addresses,
        )
        identity = CudaTransform((), {}, shape[1], device)
    invariant = os.environ.get(INVARIANT_VARIABLE, "") not in ("", "0")
    most = most_tokens(scheme, shape, device, CudaTilesKernel.name, MOST_TOKENS)
    return CudaWeight(native, format, scheme, shape, device, activation_form(), invariant, identity, most)


def _product(weight: CudaWeight, x: Tensor, bias: Tensor | None, transform: CudaTransform | None) -> Tensor:
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty(0, weight.shape[0])
    if weight.batch_invariant and x.dtype != torch.float32:
        if tokens > MOST_TOKENS:
            return torch.cat([_product(weight, part, bias, transform) for part in x.split(MOST_TOKENS)])
    elif x.dtype == torch.float32 or tokens > weight.most_tokens:
        z = x if transform is None else transform.apply(x)[:, : weight.shape[1]]
        return torch.nn.functional.linear(z, _dequantized(weight, x.dtype), bias)
    if weight.format == "progressive" or (weight.form == "int8" and weight.int8_gemm):
        return _gemm_int8(weight, (transform or weight.identity).quantize(x, planes=False), x.dtype, bias)
    if weight.form != "16bit" and weight.format == "trellis" and tokens <= GEMV_TOKENS:
        exact = weight.form == "exact"
        return _gemv(weight, (transform or weight.identity).quantize(x, planes=exact), x.dtype, bias)
    z = _on_16_bytes(x) if transform is None else transform.apply(x)
    y = x.new_empty(tokens, weight.shape[0])
    _gemm(
        weight,
        cuda_module().Call(
            z.data_ptr(),
            0,
            0,
            0,
            _address(bias),
            y.data_ptr(),
            2 * z.stride(0),
            tokens,
            2 * z.shape[1],
            DTYPES[x.dtype],
        ),
        tokens,
        x.dtype,
        int8=False,
    )
    return y


def _gemm_int8(weight: CudaWeight, x: Int8Input, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    tokens, stride = x.codes.shape
    y = torch.empty(tokens, weight.shape[0], dtype=dtype, device=weight.device)
    scale, total = x.scale.data_ptr(), x.sum.data_ptr()
    _gemm(
        weight,
        cuda_module().Call(
            x.codes.data_ptr(), 0, scale, total, _address(bias), y.data_ptr(), stride, tokens, stride, DTYPES[dtype]
        ),
        tokens,
        dtype,
        int8=True,
    )
    return y


def _gemm(weight: CudaWeight, call: Any, tokens: int, dtype: torch.dtype, *, int8: bool) -> None:
    stream = current_stream(weight.device)
    space = workspace(weight.device, stream)
    plan = weight.plan(tokens, dtype, int8)
    weight.native.gemm(plan, int8, call, space.parts.data_ptr(), space.counters.data_ptr(), stream)


def _gemv(weight: CudaWeight, x: Int8Input, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    tokens, stride = x.codes.shape
    y = torch.empty(tokens, weight.shape[0], dtype=dtype, device=weight.device)
    stream = current_stream(weight.device)
    space = workspace(weight.device, stream)
    blocks = weight.gemv_blocks(tokens, x.low is not None)
    call = cuda_module().Call(
        x.codes.data_ptr(), _address(x.low), x.scale.data_ptr(), x.sum.data_ptr(), _address(bias), y.data_ptr(),
        stride, tokens, stride, DTYPES[dtype],
    )  # fmt: skip
    weight.native.gemv(blocks, call, space.parts.data_ptr(), space.counters.data_ptr(), stream)
    return y


def _dequantized(weight: CudaWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    weight.native.dequantize(out.data_ptr(), DTYPES[dtype], current_stream(weight.device))
    return out


def _on_16_bytes(x: Tensor) -> Tensor:
    """x [tokens, in] with rows on 16 bytes, padded with zeros to 8 columns where they are not."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    if x.shape[1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    # .contiguous() would leave a single row alone, whatever its stride and its address
    return x.clone(memory_format=torch.contiguous_format)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _on:
    """The device is torch's current one inside; nothing where it is the host twin's."""

    def __init__(self, device: torch.device) -> None:
        self._guard = torch.cuda.device(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, *what: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*what)


KERNEL = CudaTilesKernel()
