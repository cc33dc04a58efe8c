"""`--device`: which there are; whole runs on a pretended GPU (tests/quant/pretend_gpu.py) write the CPU's bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitpalette.calibrate.run as running
import bitpalette.quant.codec
from bitpalette.calibrate import compile as compiling
from bitpalette.calibrate import device as devices
from bitpalette.calibrate import stream as streaming
from bitpalette.calibrate.collect import Moment, collecting, expert_stats, finished
from bitpalette.calibrate.compile import REPORT, Compilation
from bitpalette.calibrate.device import choose_device
from bitpalette.calibrate.journal import Journal
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.structure import quantizable
from bitpalette.formats.errors import FormatError
from bitpalette.quant import scale, trellis
from bitpalette.quant.native import available_isas

Make = Callable[..., Compilation]

FOLDERS = [Path(running.__file__).parent, Path(bitpalette.quant.codec.__file__).parent]

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv1d": ("gpt2", {"solver": "gptq"}),
    "experts, folded": ("mixtral", {"solver": "rtn", "rotate": True, "fold": True}),
    "trellis": ("llama", {"codec": "trellis", "bits": 2.5, "effort": "fast", "group_size": None}),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq, rotated": ("llama", {"solver": "gptq", "fold": False}),
    "a tied head, awq": ("qwen2", {"preset": "awq"}),
    "folded": ("llama", {"solver": "ldlq", "fold": True}),
    "folded, tied": ("qwen3", {"solver": "rtn", "rotate": True, "fold": True}),
    "experts": ("mixtral", {"solver": "gptq"}),
    "progressive": ("gemma2", {"solver": "gptq", "set_": ["*proj.weight=progressive=true"]}),
    "points of the plane": ("llama", {"preset": "higgs"}),
    "no statistics": ("llama", {"preset": "nvfp4"}),
}
CASES = [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture
def gpu(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU, without CuPy, for a context."""
    monkeypatch.setattr(scale, "search_scale", partial(scale.search_scale, steps=2))  # of 20: each is as the others
    monkeypatch.setattr(compiling, "choose_device", lambda name: pretended.DEVICE if "cuda" in name else CPU)
    monkeypatch.setattr(trellis, "why_not_on_gpu", lambda device: "there is no CuPy (made up)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))  # transformers asks
    return pretended.PretendGpu(*FOLDERS)


CPU = torch.device("cpu")


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_gpu(
    case: str,
    checkpoint: Callable[..., Path],
    compilation: Make,
    gpu: Any,
    pretended: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, options = (RUNS | SLOW)[case]
    if options.get("codec") == "trellis" and not available_isas():
        pytest.skip("the CPU extension is not built")
    model = checkpoint(family)
    want = compilation(model, model.parent / "cpu", sequences=2, **options).run()
    run = compilation(model, model.parent / "gpu", sequences=2, device="cuda", **options)
    coded: list[str] = []
    streams: list[Any] = []
    start = streaming.start
    monkeypatch.setattr(streaming, "start", lambda *args: streams.append(start(*args)) or streams[-1])

    def layer(record: Any, seconds: float) -> None:
        coded.append(record.parameter)
        there = {n for n in run.skeleton.parameters if isinstance(run.skeleton.get(n), pretended.GpuTensor)}
        assert not any(isinstance(h, pretended.GpuTensor) for stream in streams for h in stream.hidden)
        assert not there, "a block stays on the GPU while its weights are coded, one after another"

    run.events.layer = layer
    with gpu:
        assert run.run() == want and len(coded) == len(want)
    assert weights(model.parent / "gpu") == weights(model.parent / "cpu")
    assert gpu.read["cpu"] > len(coded), "nothing was on the GPU"
    assert not gpu.unplaced, f"these factories name no device: {sorted(gpu.unplaced)}"
    report = json.loads((model.parent / "gpu" / REPORT).read_text())
    assert report["job"]["device"] == "cuda"


@pytest.mark.slow
def test_statistics_that_are_kept(checkpoint: Callable[..., Path], compilation: Make, gpu: Any) -> None:
    """Collected on the GPU, they serve there and on the CPU."""
    model = checkpoint("mixtral")
    runs = {"gpu": {"device": "cuda"}, "again": {"device": "cuda"}, "cpu": {}}
    for name, options in runs.items():
        out = model.parent / name
        with gpu:
            compilation(model, out, sequences=2, solver="gptq", stats=model.parent / "stats", **options).run()
    assert weights(model.parent / "gpu") == weights(model.parent / "again") == weights(model.parent / "cpu")
    assert not gpu.unplaced, sorted(gpu.unplaced)


@pytest.mark.slow
def test_a_killed_run(
    checkpoint: Callable[..., Path], compilation: Make, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes on where it was, and nowhere else."""
    monkeypatch.setattr(running, "HIDDEN_EVERY", 0.0)
    model = checkpoint("llama")
    compilation(model, model.parent / "whole", solver="gptq").run()
    add = Journal.add

    def add_two(journal: Journal, part: dict[str, Any]) -> None:
        if part["part"] == 1:
            raise KeyboardInterrupt
        add(journal, part)

    monkeypatch.setattr(Journal, "add", add_two)
    out = model.parent / "out"
    with gpu, pytest.raises(KeyboardInterrupt):
        compilation(model, out, solver="gptq", device="cuda").run()
    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(FormatError, match='device: "cuda" then, "cpu" now'):
        compilation(model, out, solver="gptq").run()
    with gpu:
        compilation(model, out, solver="gptq", device="cuda").run()
    assert weights(out) == weights(model.parent / "whole")


def test_moments_on_a_gpu(families: Any, ids: Tensor, gpu: Any, pretended: Any) -> None:
    """They are where the inputs are, experts that no token reached too, and equal to the CPU's."""
    for family in ("llama", "mixtral"):
        model, there = families[family](), families[family]()
        with gpu:
            for module in there.modules():  # as `to` does, which asks torch itself about devices
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[key] = nn.Parameter(parameter.detach().to(pretended.DEVICE), False)
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = buffer.to(pretended.DEVICE)
        chosen = quantizable(model)
        with collecting(model, chosen) as want, torch.no_grad():
            model(input_ids=ids)
        with gpu, collecting(there, chosen) as got, torch.no_grad():
            there(input_ids=ids.to(pretended.DEVICE))
        assert got.keys() == want.keys()
        with gpu:
            on_cpu, on_gpu = finished(want), finished(got)
        for name in on_cpu:
            pairs = zip(*(s if isinstance(s, list) else [s] for s in (on_cpu[name], on_gpu[name])), strict=True)
            for a, b in pairs:
                assert isinstance(b.hessian, pretended.GpuTensor) and isinstance(b.absmean, pretended.GpuTensor)
                assert torch.equal(a.hessian, b.hessian.cpu()) and torch.equal(a.absmean, b.absmean.cpu())
    with gpu:
        unreached = expert_stats([Moment(5, pretended.DEVICE), Moment(5, pretended.DEVICE)])
    for stats in unreached:
        assert isinstance(stats.hessian, pretended.GpuTensor) and isinstance(stats.absmean, pretended.GpuTensor)


def test_choose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU == choose_device("cpu:0")
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", "abacus", "meta", ""):
        with pytest.raises(PlanError, match="--device"):
            choose_device(name)
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match=r"--device cuda: torch \S+ sees 0 CUDA devices; --device cpu") as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)
