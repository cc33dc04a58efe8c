"""What is compared on a GPU: the registry's kernels, a weight dequantized for each call, torch's 16-bit product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.base import Kernel, Packed
from ..kernels.cuda_tiles import MOST_TOKENS, CudaTilesKernel
from ..kernels.measured_choice import DEQUANTIZE
from ..kernels.native_cuda import current_stream
from ..kernels.registry import kernels
from ..quant.native import DTYPES
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from .contender import Call, Contender, Expected, clone, scheme_label

TORCH = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}
"""By cuBLAS."""


def torch_contender(name: str, shape: tuple[int, int], generator: torch.Generator) -> Contender:
    """One of TORCH on the generator's device."""
    dtype = TORCH[name]

    def new_copy() -> Call:
        w = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).mul_(0.02)
        return lambda x: functional.linear(x, w)

    nbytes = 2 * shape[0] * shape[1]
    return Contender(name, "", "", name[6:], shape, nbytes, new_copy(), new_copy, lambda x: x.to(dtype))


def names_on(scheme: Scheme, shape: tuple[int, int], device: torch.device, names: tuple[str, ...]) -> Iterator[str]:
    """Of `names`, the kernels that run the scheme there, and `dequantize`, which goes by the CUDA kernel's writer."""
    for name, kernel in kernels().items():
        if name in names and kernel.why_not(scheme, shape, device) is None:
            yield name
            if name == "cuda":
                yield DEQUANTIZE


def gpu_contender(name: str, qt: QuantizedTensor, dtype: torch.dtype, expected: Expected | None) -> Contender:
    """A name of `names_on`, with its own layout of qt, whose fields are on the GPU."""
    kernel = kernels()["cuda" if name == DEQUANTIZE else name]
    master = clone(kernel.prepare(qt))
    call = _dequantizing if name == DEQUANTIZE else _multiplying
    return Contender(
        kernel=name,
        scheme=scheme_label(qt.scheme),
        isa="",
        dtype=str(dtype).removeprefix("torch."),
        shape=master.shape,
        nbytes=master.nbytes,
        first=call(kernel, master),
        new_copy=lambda: call(kernel, clone(master)),
        to_input=lambda x: x.to(dtype),
        expected=expected,
    )


def _multiplying(kernel: Kernel, packed: Packed) -> Call:
    if isinstance(
        kernel, CudaTilesKernel
    ):  # by the codes, also where an earlier table says that dequantizing is faster
        kernel.weight(packed).most_tokens = MOST_TOKENS
    return lambda x: kernel.linear(x, packed, None)


def _dequantizing(kernel: Kernel, packed: Packed) -> Call:
    """Into memory of its own, then cuBLAS: for numbers of tokens at which the kernel would not."""

    def call(x: Tensor) -> Tensor:
        w = torch.empty(packed.shape, dtype=x.dtype, device=x.device)
        native = kernel.weight(packed).native  # type: ignore[attr-defined]
        native.dequantize(w.data_ptr(), DTYPES[x.dtype], current_stream(x.device))
        return functional.linear(x, w)

    return call


def on_device(qt: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    return dataclasses.replace(qt, fields={name: tensor.to(device) for name, tensor in qt.fields.items()})
