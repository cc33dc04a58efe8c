"""What every call into bitpalette._cuda needs beside its tensors: a stream, and workspace that belongs to it.

Workspace is made at the first call on a stream and never moved or freed, so that a captured CUDA graph may keep its
addresses. A stream that is being captured cannot have memory cleared at once: it gets one of a few that were made when
the first weight came to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..quant.native import NativeError
from .base import KernelError

_cuda: ModuleType | None
try:
    from .. import _cuda  # type: ignore[attr-defined, no-redef]

    import_error = ""
except ImportError as error:  # built without nvcc, or for another Python: Triton or torch runs, and says why
    _cuda, import_error = None, str(error)

LEAST_CAPABILITY = (8, 0)
PART_WORDS = 2 * 2 * 160 * 256 * 64
"""Partial sums of two blocks on each of 160 multiprocessors, two output tiles of 256 rows and 64 tokens a block."""
COUNTERS = 1 << 18
_SPARE = 2


@dataclass(frozen=True)
class Workspace:
    """parts: int32 [PART_WORDS], whatever is in it. counters: int32 [COUNTERS], zero between calls."""

    parts: Tensor
    counters: Tensor


_of_stream: dict[tuple[torch.device, int], Workspace] = {}
_spare: dict[torch.device, list[Workspace]] = {}


def why_no_cuda_module() -> str | None:
    """None where bitpalette._cuda is there, else why not, and what to do."""
    if _cuda is None:
        return f"the CUDA module is not built ({import_error}); `BITPALETTE_CUDA=1 pip install .` builds it with nvcc"
    return None


def cuda_module() -> ModuleType:
    """bitpalette._cuda. NativeError where it was not built."""
    if _cuda is None:
        raise NativeError(str(why_no_cuda_module()))
    return _cuda


def why_not_device(device: torch.device) -> str | None:
    """None where the CUDA kernels run on this device, else the reason in words."""
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    reason = why_no_cuda_module()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 8.0; {device} has {capability[0]}.{capability[1]}"
    return None


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream there."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def keep_spare_workspace(device: torch.device) -> None:
    """Some workspace for streams that are first used while they are captured."""
    if device not in _spare:
        _spare[device] = [_make(device) for _ in range(_SPARE)]


def workspace(device: torch.device, stream: int) -> Workspace:
    """That of a stream. KernelError where a third stream is first used while it is being captured."""
    found = _of_stream.get((device, stream))
    if found is None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:
            found = _make(device)
        elif _spare.get(device):
            found = _spare[device].pop()
        else:
            raise KernelError(
                f"more than {_SPARE} streams of {device} are captured that no quantized layer ran on before: "
                "run the layers once on the stream, then capture"
            )
        _of_stream[device, stream] = found
    return found


def _make(device: torch.device) -> Workspace:
    with torch.inference_mode(False):
        parts = torch.empty(PART_WORDS, dtype=torch.int32, device=device)
        return Workspace(parts, torch.zeros(COUNTERS, dtype=torch.int32, device=device))


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    if device not in _shared:
        _shared[device] = int(cuda_module().shared_limit())
    return _shared[device]


_shared: dict[torch.device, int] = {}
