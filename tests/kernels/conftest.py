"""For the tests on a GPU (test_gpu_*.py): the device, every format of the packed tiles, memory with guards."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels import native_cuda
from bitpalette.kernels.base import Packed
from bitpalette.kernels.registry import kernels
from bitpalette.quant.codec import get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.tensor import QuantizedTensor

GPU = torch.device("cuda", 0)


def _int(bits: int, group: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"codec": "int", "bits": bits, "group_size": group, "symmetric": symmetric, **more}


SCHEMES: list[dict[str, Any]] = [
    *(_int(bits, group, symmetric=group in (0, 64)) for bits in (2, 3, 4, 8) for group in (0, 32, 64, 128)),
    *(_int(bits, group, symmetric=group not in (0, 64)) for bits in (4, 8) for group in (0, 128)),
    _int(4, 256),
    *(_int(4, group, symmetric, progressive=True) for group, symmetric in ((32, True), (64, False), (128, True))),
    *({"codec": "lut", "entries": e, "table": "kmeans", "group_size": g} for e, g in ((5, 0), (4, 32), (6, 128))),
    {"codec": "lut", "entries": 8, "group_size": 64},
    {"codec": "lut", "entries": 12, "table": "kmeans"},
    {"codec": "lut", "entries": 16, "group_size": 128},
    {"codec": "lut", "entries": 16, "table": "kmeans", "scaled": False},
    {"codec": "float", "element": "e2m1", "group_size": 32},
    {"codec": "float", "element": "e2m1"},
    {"codec": "float", "element": "e4m3", "group_size": 64},
    {"codec": "float", "element": "e4m3"},
    *({"codec": "trellis", "rate": m / 16, "window": 16} for m in (16, 24, 32, 40, 48, 56, 64, 80)),
    *({"codec": "trellis", "rate": m / 16, "window": w} for m, w in ((17, 12), (37, 14), (49, 16), (63, 12))),
]
NAMES = ["-".join(str(v) for v in values.values()) for values in SCHEMES]


BY_TRITON = ("int-4-128", "int-3-32", "int-4-64-False-True", "lut-8-64", "float-e2m1-32", "trellis-2.5-16")
"""triton_device/ has tests of all formats, which `test_triton_kernels.py` runs on a GPU: here are a few beside CUDA."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`gpu_kernel`: by CUDA and by Triton; with `gpu_scheme`: every format by CUDA, a few by Triton."""
    names = metafunc.fixturenames
    formats = {name: Scheme.from_dict(values) for name, values in zip(NAMES, SCHEMES, strict=True)}
    if "gpu_scheme" in names and "kernel_name" in names:
        pairs = [("cuda", name) for name in formats]
        pairs += [("triton", name) for name in formats if name.startswith(BY_TRITON)]
        values = [(kernel, formats[name]) for kernel, name in pairs]
        metafunc.parametrize(("kernel_name", "gpu_scheme"), values, ids=["-".join(pair) for pair in pairs])
    elif "gpu_scheme" in names:
        metafunc.parametrize("gpu_scheme", list(formats.values()), ids=list(formats))
    elif "kernel_name" in names:
        metafunc.parametrize("kernel_name", ["cuda", "triton"])


@pytest.fixture
def gpu() -> torch.device:
    if GPU.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return GPU


@pytest.fixture
def gpu_kernel(kernel_name: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel "cuda", then "triton", whose launches are not timed for these shapes. The test fails without it."""
    monkeypatch.setenv("BITPALETTE_TRITON_TUNE", "0")
    return _kernel(kernel_name, gpu)


@pytest.fixture
def cuda_kernel(gpu: torch.device) -> Any:
    return _kernel("cuda", gpu)


def _kernel(name: str, device: torch.device) -> Any:
    kernel = kernels()[name]
    reason = kernel.why_not(IntScheme(bits=4, group_size=64), (64, 64), device)
    assert reason is None, reason
    return kernel


class GpuWeight:
    """Random codes for one kernel on the GPU, and what the codec says they are."""

    def __init__(self, kernel: Any, qt: QuantizedTensor, device: torch.device, guards: Guards | None) -> None:
        self.kernel, self.qt = kernel, qt
        self.decoded = get_codec(qt.scheme.codec).decode(qt).double().to(device)
        on_device = QuantizedTensor(qt.scheme, qt.shape, {name: t.to(device) for name, t in qt.fields.items()})
        self.packed: Packed = kernel.prepare(on_device)
        if guards is not None:
            self.packed.tensors = {name: guards.copy(t) for name, t in self.packed.tensors.items()}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.kernel.linear(x, self.packed, bias)
        return y

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """float64, by the codec's own decoding."""
        return x.double() @ self.decoded.T + (0 if bias is None else bias.double())


@pytest.fixture
def gpu_weight(gpu: torch.device) -> Callable[..., GpuWeight | None]:
    """gpu_weight(kernel, scheme, shape, guards=None, **fields) -> GpuWeight; None for a shape the scheme has not.

    fields: instead of random ones.
    """
    from bitpalette.kernel_bench.random_weight import random_weight

    def make(
        kernel: Any, scheme: Scheme, shape: tuple[int, int], guards: Guards | None = None, **fields: Tensor
    ) -> GpuWeight | None:
        try:
            scheme.check_shape(shape)
        except SchemeError:
            return None
        seed = zlib.crc32(f"{scheme} {shape}".encode())
        qt = random_weight(scheme, shape, torch.Generator().manual_seed(seed))
        qt.fields.update(fields)
        return GpuWeight(kernel, qt, gpu, guards)

    return make


class Guards:
    """Tensors with bytes of NaN (0xFF) on both sides, themselves full of them until they are written."""

    SIDE = 4096

    def __init__(self) -> None:
        self._whole: list[tuple[Tensor, int]] = []

    def empty(self, size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = torch.Size(size)
        nbytes = shape.numel() * dtype.itemsize
        whole = _EMPTY(2 * self.SIDE + nbytes, dtype=torch.uint8, device=device).fill_(0xFF)
        self._whole.append((whole, nbytes))
        return whole[self.SIDE : self.SIDE + nbytes].view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        """AssertionError where a byte beside a tensor was written."""
        for whole, nbytes in self._whole:
            assert bool((whole[: self.SIDE] == 0xFF).all()), f"written before a tensor of {nbytes} bytes"
            assert bool((whole[self.SIDE + nbytes :] == 0xFF).all()), f"written behind a tensor of {nbytes} bytes"


_EMPTY = torch.empty


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[Guards]]:
    """`with guards() as g`: what kernels allocate inside is guarded too; the guards are checked at the end."""

    @contextlib.contextmanager
    def guarding() -> Iterator[Guards]:
        g = Guards()

        def on_gpu(device: Any) -> bool:
            return device is not None and torch.device(device).type == GPU.type

        def empty(*size: Any, **options: Any) -> Tensor:
            if not on_gpu(options.get("device")):
                return _EMPTY(*size, **options)
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return g.empty(shape, options.get("dtype") or torch.float32, options["device"])

        def empty_like(tensor: Tensor, **options: Any) -> Tensor:
            return empty(tensor.shape, dtype=options.get("dtype", tensor.dtype), device=tensor.device)

        def new_empty(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
            return empty(*size, dtype=options.get("dtype", tensor.dtype), device=tensor.device)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", empty)
            patched.setattr(torch, "empty_like", empty_like)
            patched.setattr(torch.Tensor, "new_empty", new_empty)
            yield g
            if GPU.type == "cuda":
                torch.cuda.synchronize()
            g.check()
            for space in native_cuda._of_stream.values():
                assert not bool(space.counters.any()), "counters of a stream's workspace are not zero after its calls"

    return guarding
