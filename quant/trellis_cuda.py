"""The encoder of codec `trellis` on a GPU: csrc/cuda/trellis_encode.cuh, compiled by CuPy when it is first needed.

The result is that of the CPU's encoder, bit for bit. It is compiled for one rate, window and GPU at a time, since the
kernel's loops are unrolled for them: one to three seconds, and CuPy keeps the binary on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from .native import NativeError, chosen_isa, cpu_module, isa_index

WEIGHTS = 256
LEAST_CAPABILITY = (8, 0)
"""Of the GPU: minima across a warp in one instruction, 64 KiB of shared memory to a block."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and started for m = `row_bits` and L = `window`; it asserts the sizes."""

    row_bits: int
    window: int

    def __post_init__(self) -> None:
        if not (16 <= self.row_bits <= 80 and self.window in (12, 14, 16)):
            raise ValueError(
                f"row_bits is 16 to 80 and window 12, 14 or 16; got row_bits={self.row_bits}, window={self.window}"
            )

    @property
    def row(self) -> int:
        """Costs in the longest row: states by their low bits, 2^(L - k) for the smaller step k."""
        return 1 << (self.window - self.row_bits // 16)

    @property
    def threads(self) -> int:
        """To a tile: 16 states or more for one, at most 512; but 32 costs of a row (16 registers) for one, and two."""
        smallest = 1 << (self.window - -(-self.row_bits // 16))
        return min(smallest // 2, max(self.row // 32, min(512, (1 << self.window) // 16)))

    @property
    def shared_bytes(self) -> int:
        return 2 * self.row

    @property
    def scratch_words(self) -> int:
        """32-bit words of global memory to a block: the decisions of 257 steps, and one row."""
        return (WEIGHTS + 1) * max(self.threads, 1 << (self.window - 6)) + self.row // 2

    @property
    def options(self) -> tuple[str, ...]:
        """For nvcc and for NVRTC."""
        return (
            "-std=c++17",
            f"-DTRELLIS_ROW_BITS={self.row_bits}",
            f"-DTRELLIS_WINDOW={self.window}",
            f"-DTRELLIS_THREADS={self.threads}",
            f"-DTRELLIS_SHARED_BYTES={self.shared_bytes}",
            f"-DTRELLIS_SCRATCH_WORDS={self.scratch_words}",
        )


def source() -> str:
    """The text of the kernel, which is installed beside the Python files."""
    return files("bitpalette").joinpath("cuda/trellis_encode.cuh").read_text()


def import_cupy() -> Any:
    """The module cupy. NativeError where it is missing."""
    try:
        import cupy
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise NativeError(
            f"encoding trellis codes on a GPU needs CuPy ({reason}): `pip install 'bitpalette[cuda]'`, "
            "or move the weight to the CPU"
        ) from error
    return cupy


@lru_cache(maxsize=32)
def why_not_on_gpu(device: torch.device) -> str | None:
    """None where `encode_on_gpu` runs on this CUDA device, else the reason in words."""
    try:
        import_cupy()
    except NativeError as error:
        return (
            f"there is no CuPy ({str(error.__cause__).strip().partition(chr(10))[0]}); `pip install 'bitpalette[cuda]'`"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0; {device} has {capability[0]}.{capability[1]}"
    return None


@lru_cache(maxsize=32)
def _kernel(device: int, launch: Launch) -> tuple[Any, int]:
    """(kernel, blocks that run at once on the device); the device is CuPy's current one."""
    cupy = import_cupy()
    module = cupy.RawModule(code=source(), options=launch.options)
    kernel = module.get_function("trellis_encode")
    kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
    resident = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
        kernel.kernel.ptr, launch.threads, launch.shared_bytes
    )
    return kernel, resident * torch.cuda.get_device_properties(device).multi_processor_count


def encode_on_gpu(x: Tensor, row_bits: int, window: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [tiles, 2 m], levels float32 [tiles, 256]), on x's device, of tiles x [tiles, 256] in levels.

    x is float32 on a CUDA device and finite. Runs on torch's current stream and waits for it: the few tiles whose costs
    do not fit 16 bits (csrc/cpu/trellis_exact.h) are left to the CPU's encoder. ValueError for another x, rate or
    window; NativeError where CuPy, a GPU that can run it or, for such tiles, the native module is missing.
    """
    launch = Launch(row_bits, window)
    if not (x.is_cuda and x.dtype == torch.float32 and x.ndim == 2 and x.shape[1] == WEIGHTS):
        raise ValueError(
            f"the GPU encoder takes float32 [tiles, {WEIGHTS}] on a CUDA device; "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    capability = torch.cuda.get_device_capability(x.device)
    if capability < LEAST_CAPABILITY:
        raise NativeError(
            f"encoding trellis codes needs a GPU of compute capability 8.0; {x.device} has "
            f"{capability[0]}.{capability[1]}: move the weight to the CPU"
        )
    cupy = import_cupy()
    x, tiles, device = x.contiguous(), len(x), x.device.index
    codes = torch.empty(tiles, 2 * row_bits, dtype=torch.uint8, device=x.device)
    levels = torch.empty_like(x)
    if tiles == 0:
        return codes, levels
    left = torch.empty(tiles, dtype=torch.bool, device=x.device)
    with cupy.cuda.Device(device), torch.cuda.device(device):
        kernel, resident = _kernel(device, launch)
        blocks = min(tiles, resident)
        scratch = torch.empty(blocks * launch.scratch_words, dtype=torch.int32, device=x.device)
        arguments = (x.data_ptr(), tiles, *(t.data_ptr() for t in (codes, levels, left, scratch)))
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream, device):
            kernel((blocks,), (launch.threads,), arguments, shared_mem=launch.shared_bytes)
    again = left.nonzero().flatten()
    if len(again):
        codes[again], levels[again] = (part.to(x.device) for part in _encode_on_cpu(x[again].cpu(), launch))
    return codes, levels


def _encode_on_cpu(x: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    codes = torch.empty(len(x), 2 * launch.row_bits, dtype=torch.uint8, device="cpu")
    levels = torch.empty_like(x)
    cpu_module().trellis_encode(
        isa_index(chosen_isa()),
        x.data_ptr(),
        len(x),
        launch.row_bits,
        launch.window,
        codes.data_ptr(),
        levels.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, levels
