"""Every codec, solver and transform on a GPU that is pretended (pretend_gpu.py): nothing leaves it unasked, and the
fields are those of the CPU, whose numbers it has. On a real one: test_gpu_solvers.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitpalette.quant.codec
from bitpalette.quant import scale, trellis
from bitpalette.quant.codec import codec_names
from bitpalette.quant.native import available_isas
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor, solver_names
from bitpalette.quant.stats import Stats, output_error
from bitpalette.quant.trellis_cuda import why_not_on_gpu

QUANT = Path(bitpalette.quant.codec.__file__).parent
OUT, IN = 17, 72

MORE: dict[str, list[dict[str, Any]]] = {  # beside a codec's defaults
    "int": [
        {"bits": 3, "group_size": 16, "symmetric": False},
        {"bits": 8, "per_input_channel": True},
        {"group_size": 16, "symmetric": False, "progressive": True},
    ],
    "float": [
        {"element": "e4m3"},
        {"group_size": 32, "scale_format": "e8m0", "element": "e3m2"},
        {"group_size": 16, "scale_format": "e4m3"},
    ],
    "lut": [
        {"table": "kmeans", "entries": 9, "group_size": 16},
        {"table": "kmeans", "table_scope": "row", "scaled": False},
        {"table": "nf4"},
        {"dims": 2, "entries": 16},
    ],
    "trellis": [{"rate": 2.5, "window": 12}],
}
SCHEMES = [{"codec": name, **more} for name in codec_names() for more in MORE.get(name, [{}])]
CHAINS = [("rotate",), ("scale", "rotate", "order")]
FIRST = [schemes[0] for schemes in MORE.values()]
METHODS = [*solver_names(), "awq", "awq+gptq"]
CASES = [
    (scheme, solver, chain)
    for scheme, solver in itertools.product(SCHEMES, METHODS)
    for chain in [(), *(CHAINS if solver in ("rtn", "ldlq") and scheme in FIRST else [])]
    if "awq" not in solver or scheme in FIRST
]


def possible(values: dict[str, Any], solver: str, chain: tuple[str, ...]) -> bool:
    scheme = Scheme.from_dict(values)
    if solver == "squeezellm":
        return values.get("table_scope") == "row" and not chain
    return not (scheme.block > 1 and "gptq" in solver)


@pytest.fixture
def gpu(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The GPU, with CuPy, whose encoder is the CPU's."""

    def encode(x: Tensor, row_bits: int, window: int) -> tuple[Tensor, Tensor]:
        assert isinstance(x, pretended.GpuTensor)
        codes, levels = trellis.encode(pretended.inside(x), row_bits, window)
        return codes.to(x.device), levels.to(x.device)

    monkeypatch.setattr(scale, "search_scale", partial(scale.search_scale, steps=2))  # of 20: each is as the others
    monkeypatch.setattr(trellis, "why_not_on_gpu", lambda device: None)
    monkeypatch.setattr(trellis, "encode_on_gpu", encode)
    with pretended.PretendGpu(QUANT) as mode:
        yield mode


def layer() -> tuple[Tensor, Stats]:
    g = torch.Generator().manual_seed(5)
    w = torch.randn(OUT, IN, generator=g) * 0.02
    x = torch.randn(128, IN, generator=g) * torch.linspace(0.2, 4, IN) @ torch.randn(IN, IN, generator=g) / IN**0.5
    return w, Stats(x.T @ x / len(x), x.abs().mean(0), len(x), fisher=torch.rand(OUT, IN, generator=g))


def moved(stats: Stats, device: torch.device) -> Stats:
    fisher = None if stats.fisher is None else stats.fisher.to(device)
    return Stats(stats.hessian.to(device), stats.absmean.to(device), stats.tokens, fisher)


@pytest.mark.parametrize("case", [c for c in CASES if possible(*c)], ids=str)
def test_on_the_device_of_the_weight(case: tuple[Any, str, Any], gpu: Any, pretended: Any) -> None:
    values, solver, chain = case
    if (values["codec"] == "trellis" or solver == "squeezellm") and not available_isas():
        pytest.skip("the CPU extension is not built")
    w, stats = layer()
    scheme = Scheme.from_dict(values).replace(transforms=chain)
    want = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=3)
    there = moved(stats, pretended.DEVICE)
    got = quantize_tensor(w.to(pretended.DEVICE), scheme, solver=solver, stats=there, seed=3)
    assert got.scheme == want.scheme and got.notes == want.notes
    assert got.fields.keys() == want.fields.keys()
    for name, field in got.fields.items():
        assert isinstance(field, pretended.GpuTensor), name
        assert torch.equal(field.cpu(), want.fields[name]), name
    dense = got.dequantize()
    assert isinstance(dense, pretended.GpuTensor) and torch.equal(dense.cpu(), want.dequantize())
    assert output_error(w.to(pretended.DEVICE), dense, there) == output_error(w, want.dequantize(), stats)
    assert not gpu.unplaced, f"these factories name no device: {sorted(gpu.unplaced)}"


def test_feedback_does_not_read_every_column_back(gpu: Any, pretended: Any) -> None:
    """A read waits for the GPU: as many for many columns as for few."""
    reads = []
    for solver, n in itertools.product(("gptq", "ldlq"), (64, 256)):
        x = torch.randn(300, n, generator=torch.Generator().manual_seed(n))
        stats = moved(Stats(x.T @ x / 300, x.abs().mean(0), 300), pretended.DEVICE)
        gpu.read.clear()
        quantize_tensor(x[:16].to(pretended.DEVICE), {"codec": "int", "group_size": 16}, solver=solver, stats=stats)
        reads.append(gpu.read.total())
    assert reads[0] == reads[1] and reads[2] == reads[3], reads


def test_a_gpu_without_cupy(pretended: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Codes are searched on the CPU, to the same result, and one line says so, once."""
    if not available_isas():
        pytest.skip("the CPU extension is not built")
    monkeypatch.setattr(trellis, "why_not_on_gpu", lambda device: "there is no CuPy (made up)")
    trellis._say.cache_clear()
    w, stats = layer()
    values = {"codec": "trellis", "rate": 2.5, "window": 12}
    want = quantize_tensor(w, values, solver="ldlq", stats=stats)
    with pretended.PretendGpu():
        got = quantize_tensor(w.to(pretended.DEVICE), values, solver="ldlq", stats=moved(stats, pretended.DEVICE))
        assert all(isinstance(field, pretended.GpuTensor) for field in got.fields.values())
        assert all(torch.equal(field.cpu(), want.fields[name]) for name, field in got.fields.items())
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["bitpalette: trellis codes are searched on the CPU: there is no CuPy (made up)"]


def test_why_there_is_no_search_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    device = torch.device("cuda", 7)
    monkeypatch.setitem(sys.modules, "cupy", None)  # type: ignore[arg-type]
    reason = why_not_on_gpu.__wrapped__(device)
    assert reason is not None and "pip install 'bitpalette[cuda]'" in reason and "\n" not in reason
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_on_gpu.__wrapped__(device) == "it needs a GPU of compute capability 8.0; cuda:7 has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_on_gpu.__wrapped__(device) is None


MISPLACED: dict[str, Callable[[Any, Any], Any]] = {
    "two devices": lambda t, device: t + torch.ones(3),
    "written in place": lambda t, device: torch.ones(3).mul_(t),
    "joined": lambda t, device: torch.cat([t, torch.ones(3, device="cpu")]),
    "put into": lambda t, device: t.__setitem__(slice(0, 2), torch.ones(2)),
    "numpy": lambda t, device: t.numpy(),
    "an address": lambda t, device: t.data_ptr(),
    "an output": lambda t, device: torch.add(t, t, out=torch.empty(3)),
}


@pytest.mark.parametrize("case", list(MISPLACED))
def test_what_a_gpu_refuses_is_refused(case: str, pretended: Any) -> None:
    with pretended.PretendGpu():
        t = torch.ones(3, device=pretended.DEVICE)
        with pytest.raises(RuntimeError, match="cuda:7"):
            MISPLACED[case](t, pretended.DEVICE)


def test_a_factory_without_a_device_is_seen(pretended: Any) -> None:
    with pretended.PretendGpu(Path(__file__).parent) as mode:
        torch.zeros(3, device="cpu")
        torch.zeros(3, device=pretended.DEVICE)
        assert not mode.unplaced
        torch.zeros(3)
        assert len(mode.unplaced) == 1
