"""csrc/cuda/trellis_encode.cuh: as plain C++ it gives the CPU encoder's codes; it compiles for GPUs; it runs on one."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitpalette.quant import native, trellis_cuda
from bitpalette.quant.native import NativeError
from bitpalette.quant.trellis_cuda import Launch, encode_on_gpu

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).with_name("trellis_encode_threads.cpp")

needs_cpu_module = pytest.mark.skipif(not native.available_isas(), reason="the CPU extension is not built")

# (m, window): every size of step, with and without a mixture, the cheap window mostly
ON_CPU = [(16, 12), (23, 12), (32, 12), (37, 12), (56, 12), (69, 12), (80, 12), (40, 14), (17, 16)]
TILES = 10

Encoder = Callable[[Tensor, int, int, bool], tuple[Tensor, Tensor, Tensor]]


def tiles_of(count: int) -> Tensor:
    """float32 [count, 256]: normal ones, then zeros, half out of range, an outlier, constants, integers."""
    x = torch.randn(count, 256, generator=torch.Generator().manual_seed(7)) * 147.8
    x[-5] = 0
    x[-4, 64:192] = 1e30 * x[-4, 64:192].sign()
    x[-3, 100] = 1500
    x[-2] = -511
    x[-1] = x[-1].round()
    return x


def expected(x: Tensor, m: int, window: int) -> tuple[Tensor, Tensor, int]:
    """(codes, levels, tiles that the 64-bit search did) of the CPU encoder."""
    codes, levels = torch.empty(len(x), 2 * m, dtype=torch.uint8), torch.empty_like(x)
    isa = native.isa_index(native.chosen_isa())
    left = native.cpu_module().trellis_encode(
        isa, x.data_ptr(), len(x), m, window, codes.data_ptr(), levels.data_ptr(), 1
    )
    return codes, levels, left


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The kernel's source as plain C++: (x, m, window, threads backwards) -> codes, levels, tiles left over."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("trellis") / "threads.so"
    cases = " ".join(f"CASE({m}, {window}, {Launch(m, window).threads})" for m, window in ON_CPU)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", f"-DCASES={cases}", str(HARNESS), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    function = ctypes.CDLL(str(library)).trellis_encode_threads
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_bool, pointer, ctypes.c_longlong, *[pointer] * 3]
    function.restype = ctypes.c_bool

    def encode(x: Tensor, m: int, window: int, backwards: bool) -> tuple[Tensor, Tensor, Tensor]:
        codes, levels = torch.empty(len(x), 2 * m, dtype=torch.uint8), torch.empty_like(x)
        left = torch.empty(len(x), dtype=torch.bool)
        outputs = (t.data_ptr() for t in (codes, levels, left))
        assert function(m, window, backwards, x.data_ptr(), len(x), *outputs)
        return codes, levels, left

    return encode


@needs_cpu_module
@pytest.mark.parametrize(("m", "window"), ON_CPU)
def test_plain_cpp_gives_the_codes_of_the_cpu_encoder(encoder: Encoder, m: int, window: int) -> None:
    x = tiles_of(TILES if window == 12 else 7)
    codes, levels, left = encoder(x, m, window, False)
    want_codes, want_levels, want_left = expected(x, m, window)
    assert int(left.sum()) == want_left <= len(x) // 2
    assert bool(left[-4]) or m < 52  # far out of range, costs in sixty-fourths are clipped
    assert torch.equal(codes[~left], want_codes[~left])
    assert torch.equal(levels[~left], want_levels[~left])


@pytest.mark.parametrize(("m", "window"), [(23, 12), (80, 12)])
def test_no_thread_reads_what_another_writes_in_a_phase(encoder: Encoder, m: int, window: int) -> None:
    x = tiles_of(6)
    for forwards, backwards in zip(encoder(x, m, window, False), encoder(x, m, window, True), strict=True):
        assert torch.equal(forwards, backwards)


# -- compiled for GPUs


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on PATH: the kernel is not compiled")
    return found


@pytest.mark.parametrize(
    ("m", "window", "architecture"),
    [
        (16, 16, "80"),
        (36, 16, "86"),
        (64, 14, "89"),
        (27, 12, "89"),
        (40, 16, "90a"),
        (80, 16, "90a"),
    ],
)
def test_compiles_without_spills(nvcc: str, m: int, window: int, architecture: str, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(trellis_cuda.source().replace("#pragma once", ""))
    launch = Launch(m, window)
    command = [nvcc, *launch.options, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    done = subprocess.run(
        [*command, str(kernel), "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\d+) bytes spill", done.stderr) == ["0", "0"], done.stderr
    [registers] = re.findall(r"Used (\d+) registers", done.stderr)
    [static] = re.findall(r"(\d+) bytes smem", done.stderr)
    assert int(registers) * max(launch.threads, 1024) <= 65536
    # what a block may have on the smallest of these GPUs, sm_86
    assert launch.shared_bytes + int(static) <= 99 * 1024


def test_every_rate_and_window_has_a_launch() -> None:
    for m, window in itertools.product(range(16, 81), (12, 14, 16)):
        launch = Launch(m, window)
        least, most = 1 << (window - -(-m // 16)), 1 << (window - m // 16)
        assert 32 <= launch.threads <= 1024 and launch.threads & (launch.threads - 1) == 0
        assert 2 * launch.threads <= least and most <= 32 * launch.threads


# -- what it refuses


@pytest.mark.parametrize(("m", "window"), [(15, 16), (81, 16), (32, 13)])
def test_refuses_a_code_that_does_not_exist(m: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"row_bits={m}, window={window}"):
        encode_on_gpu(torch.zeros(1, 256), m, window)


def test_refuses_a_tensor_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="on cpu"):
        encode_on_gpu(torch.zeros(1, 256), 32, 12)


def test_missing_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NativeError, match=r"needs CuPy .*bitpalette\[cuda\]"):
        trellis_cuda.import_cupy()


# -- on a GPU


@pytest.mark.gpu
@needs_cpu_module
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("m", "window"), [*ON_CPU, (40, 16), (80, 16)])
def test_gpu_gives_the_codes_of_the_cpu_encoder(m: int, window: int) -> None:
    pytest.importorskip("cupy")
    x = tiles_of(700 if window == 12 else 40)  # several tiles to a block
    codes, levels = encode_on_gpu(x.cuda(), m, window)
    want_codes, want_levels, _ = expected(x, m, window)
    assert torch.equal(codes.cpu(), want_codes)
    assert torch.equal(levels.cpu(), want_levels)
