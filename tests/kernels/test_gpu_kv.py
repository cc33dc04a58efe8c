"""kernels/kv_cuda.py against the reference: on a GPU, and on the host executor with tensors of the CPU for its own."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels import kv_cuda, native_cuda
from bitpalette.kernels.kv_cuda import KVCuda, split_counts
from bitpalette.kernels.kv_parts import Dense, Pages
from bitpalette.kernels.kv_reference import attention
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.quant.kv_format import PAGE, KVError, KVFormat
from bitpalette.quant.kv_token import encode, pack, packed_bytes, rotate

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
KERNEL = KVCuda()
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def twin(hostexec: Any) -> Any:
    """The functions of bitpalette._cuda for the cache, their device the host executor."""
    sources = [ROOT / "csrc/bind/cuda_kv.cpp", ROOT / "tests/hostexec/kv_module.cpp", *sorted(CUDA.glob("kv_*.cu"))]
    path = hostexec.build_path(sources, "plain", includes=_includes())
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def _includes() -> list[str]:
    pybind11 = pytest.importorskip("pybind11")
    return [pybind11.get_include(), sysconfig.get_paths()["include"]]


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("twin", marks=[pytest.mark.hostexec, pytest.mark.slow]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "gpu":
        found: torch.device = request.getfixturevalue("gpu")
        return found
    monkeypatch.setattr(native_cuda, "_cuda", request.getfixturevalue("twin"))
    monkeypatch.setattr(native_cuda, "_shared", {})
    return torch.device("cpu")


def close(out: Tensor, want: Tensor) -> bool:
    norm = want.norm(dim=-1)
    error = (out.double() - want).norm(dim=-1) / torch.where(norm == 0, 1.0, norm)
    return bool((error <= TOLERANCE).all())


def filled(device: torch.device, text: str, head_dim: int, dtype: torch.dtype, length: int) -> KVRows:
    """Three rows, of which two have left padding; the ring goes round."""
    form = KVFormat.parse(text, sinks=4, window=10)
    mean = torch.randn(2, head_dim, device=device)
    rows = KVRows(form, 3, 2, head_dim, head_dim, dtype, device, mean)
    new = torch.randn(2, 3, 2, length, head_dim, device=device)
    rows.append(*rows.stored(*new), np.array([0, length // 2, length - 2]))
    for _ in range(7):
        rows.append(*rows.stored(*torch.randn(2, 3, 2, 1, head_dim, device=device)), np.zeros(3, np.int64))
    return rows


@pytest.mark.parametrize(
    ("text", "head_dim", "n"),
    [
        ("k4v4", 128, 1),
        ("k2v2", 128, 1),
        ("k3v3", 64, 1),
        ("k8v4", 128, 1),
        ("k2v3", 80, 5),
        ("k3v2", 128, 16),
        ("k8v8", 256, 2),
    ],
)
def test_whole_caches_are_as_the_reference_has_them(device: torch.device, text: str, head_dim: int, n: int) -> None:
    torch.manual_seed(head_dim + n)
    dtype = torch.bfloat16 if n == 1 else torch.float16
    rows = filled(device, text, head_dim, dtype, 150)
    q, none = torch.randn(3, 8, n, head_dim, device=device), np.zeros(3, np.int64)
    new, logits = rows.stored(*torch.randn(2, 3, 2, n, head_dim, device=device)), torch.randn(8, device=device)
    options: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"sliding_window": 40}, {"sink_logits": logits}]
    for given in options:
        for fresh in (new, None):
            want = attention(q, rows, fresh, none, head_dim**-0.5, dtype=torch.float64, **given)
            assert close(KERNEL.attention(q, rows, fresh, none, head_dim**-0.5, **given), want), (given, fresh is None)


def test_padding_is_zero_and_empty_caches_are_read(device: torch.device) -> None:
    torch.manual_seed(0)
    rows = KVRows(KVFormat.parse("k4v4", sinks=2, window=3), 2, 1, 64, 64, torch.bfloat16, device)
    q, skip = torch.randn(2, 2, 6, 64, device=device), np.array([0, 4])
    new = rows.stored(*torch.randn(2, 2, 1, 6, 64, device=device))
    out = KERNEL.attention(q, rows, new, skip, 0.125)
    assert bool((out[1, :, :4] == 0).all())
    want = attention(q, rows, new, skip, 0.125, dtype=torch.float64)
    assert close(out[0], want[0]) and close(out[1, :, 4:], want[1, :, 4:])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_append_and_rotation_are_the_codecs(device: torch.device, bits: int, width: int) -> None:
    g = torch.Generator().manual_seed(width + bits)
    x, mean = torch.randn(40, 2, width, generator=g).to(device), torch.randn(2, width, generator=g).to(device)
    slots = torch.randperm(128, generator=g)[:40].to(device)
    slots[3] = -1
    codes = torch.zeros(2, 2, PAGE, packed_bytes(width, bits), dtype=torch.uint8, device=device)
    gain = torch.zeros(2, 2, PAGE, dtype=torch.float16, device=device)
    for unbiased in (True, False):
        KERNEL.append(x, slots, codes, gain, bits, unbiased, mean, rotated=False)
        c, gains = encode(rotate((x - mean).cpu()), bits, unbiased)
        there = slots.cpu() >= 0
        at = slots.cpu()[there] // PAGE, slots.cpu()[there] % PAGE
        assert torch.equal(codes.cpu()[at[0], :, at[1]], pack(c, bits)[there])
        assert torch.equal(gain.cpu()[at[0], :, at[1]], gains[there])
    assert torch.equal(KERNEL.rotate(x, mean=mean).cpu(), rotate((x - mean).cpu()))
    assert torch.equal(KERNEL.rotate(x[:, :1, :].half()).cpu(), rotate(x[:, :1, :].half().cpu()).half())


def static_cache(device: torch.device) -> tuple[Pages, Dense]:
    """Capacity for 512 tokens, all of it written."""
    g = torch.Generator().manual_seed(1)
    sides = []
    for unbiased in (True, False):
        codes, gain = encode(torch.randn(16, 2, PAGE, 128, generator=g), 4, unbiased)
        sides += [pack(codes, 4).to(device), gain.to(device)]
    table = torch.arange(16, dtype=torch.int32, device=device).view(2, 8)
    lengths = torch.tensor([400, 70], dtype=torch.int32, device=device)
    pages = Pages(sides[0], sides[1], sides[2], sides[3], 4, 4, table, lengths)
    new = torch.randn(2, 2, 1, 2, 128, generator=g).half().to(device)
    return pages, Dense(new[0], new[1], torch.ones(2, dtype=torch.int32, device=device))


@pytest.mark.gpu
def test_a_captured_graph_reads_lengths_anew(gpu: torch.device) -> None:
    pages, fresh = static_cache(gpu)
    q = torch.randn(2, 8, 1, 128, device=gpu)
    KERNEL.attend(q, pages, fresh=fresh, scale=0.1, rotate=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL.attend(q, pages, fresh=fresh, scale=0.1, rotate=True)
    for lengths in ([400, 70], [1, 512], [0, 65]):
        pages.lengths.copy_(torch.tensor(lengths))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, KERNEL.attend(q, pages, fresh=fresh, scale=0.1, rotate=True))


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits(gpu: torch.device) -> None:
    pages, fresh = static_cache(gpu)
    q = torch.randn(2, 8, 4, 128, device=gpu).bfloat16()
    outs = [KERNEL.attend(q, pages, fresh=fresh, scale=0.1) for _ in range(20)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_what_it_has_no_kernel_for_it_says() -> None:
    form = KVFormat.parse("k4v4")
    if native_cuda.why_no_cuda_module() is None:
        assert KERNEL.why_not(form, 128, 128) is None
        assert "steps of 16 up to 256, not 72" in str(KERNEL.why_not(form, 128, 72))
        assert "not 16" in str(KERNEL.why_not(KVFormat.parse("k16v4"), 128, 128))
        assert "'channel'" in str(KERNEL.why_not(KVFormat.parse("k4v4", kind="channel"), 128, 128))
    assert KERNEL.why_not(form, 128, 128, torch.device("cpu")) == "runs on CUDA devices, not on cpu"


def test_too_many_new_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cuda, "why_no_cuda_module", lambda: None)
    rows = KVRows(KVFormat.parse("k4v4"), 1, 1, 64, 64, torch.float16, torch.device("cpu"))
    with pytest.raises(KVError, match="17 new tokens; the CUDA kernels take 16"):
        KERNEL.attention(torch.zeros(1, 1, 17, 64), rows, None, np.zeros(1, np.int64), 1.0)


@pytest.mark.parametrize(
    ("heads", "rows", "width", "table_row", "dense", "want"),
    [
        (8, 4, 128, 128, 84, (48 + 1, 1)),  # 396 blocks over 8 heads
        (8, 4, 128, 20, 84, (10 + 1, 1)),  # two pages each at least
        (8, 16, 128, 2048, 300, (46 + 3, 3)),
        (8, 16, 256, 2048, 0, (24, 0)),  # two blocks for the queries
        (1, 1, 64, 4096, 84, (256, 1)),
        (128, 4, 128, 512, 84, (3, 1)),
        (8, 4, 128, 0, 84, (1, 1)),
        (8, 4, 128, 0, 0, (1, 0)),
    ],
)
def test_splits_follow_from_capacities(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    rows: int,
    width: int,
    table_row: int,
    dense: int,
    want: tuple[int, int],
) -> None:
    monkeypatch.setattr(kv_cuda, "_multiprocessors", lambda device: 132)
    assert split_counts(torch.device("cpu"), heads, rows, width, table_row, dense) == want
