"""Where a command computes: the CPU, or one GPU."""

from __future__ import annotations

import torch

from .plan import PlanError


def choose_device(name: str) -> torch.device:
    """cpu, cuda or cuda:N. PlanError for others, and where torch sees no such GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PlanError(f"--device is cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device is cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise PlanError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices; --device cpu")
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock that is read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
