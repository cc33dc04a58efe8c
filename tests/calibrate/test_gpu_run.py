"""Whole compilations on a GPU, against the CPU's. (Without one: test_device.py.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.calibrate.compile import Compilation
from bitpalette.quant.native import available_isas

pytestmark = pytest.mark.gpu

Make = Callable[..., Compilation]

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq, rotated": ("llama", {"solver": "gptq", "fold": False}),
    "a tied head, awq": ("qwen2", {"preset": "awq"}),
    "folded": ("llama", {"solver": "ldlq", "fold": True}),
    "experts": ("mixtral", {"solver": "gptq"}),
    "trellis": ("llama", {"codec": "trellis", "bits": 2.5, "effort": "fast", "group_size": None}),
    "fisher": ("llama", {"preset": "squeezellm", "group_size": None}),
}


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.mark.parametrize("case", list(RUNS))
def test_a_run(case: str, checkpoint: Callable[..., Path], compilation: Make, gpu: torch.device) -> None:
    """Errors of all layers within 2 % of the CPU's, or a thousandth of the output where they are small."""
    family, options = RUNS[case]
    if case in ("trellis", "fisher") and not available_isas():
        pytest.skip("the CPU extension is not built")
    model = checkpoint(family)
    want = compilation(model, model.parent / "cpu", **options).run()
    got = compilation(model, model.parent / "gpu", device="cuda", **options).run()
    assert [(r.parameter, r.scheme) for r in got] == [(r.parameter, r.scheme) for r in want]
    for a, b in zip(got, want, strict=True):
        assert abs(a.error - b.error) <= 0.02 * b.error + 1e-3, (a.parameter, a.error, b.error)


def test_tuning(checkpoint: Callable[..., Path], compilation: Make, gpu: torch.device) -> None:
    model = checkpoint("llama")
    run = compilation(model, model.parent / "out", sequences=12, bits=3, solver="rtn", effort="best", device="cuda")
    run.run()
    assert run.skeleton.device.type == "cuda"


def test_memory_of_one_block(checkpoint: Callable[..., Path], compilation: Make, gpu: torch.device) -> None:
    """Twice the blocks take no more of the GPU."""
    model = checkpoint("llama")
    run = compilation(model, model.parent / "out", solver="gptq", device="cuda")
    used = []
    run.events.part = lambda done, of: used.append(torch.cuda.memory_allocated(gpu))
    run.run()
    assert max(used[1:]) <= used[1] + (1 << 20), used
