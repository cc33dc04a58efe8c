"""What setup.py decides before it compiles anything: sources, flags, and whether CUDA is built."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["csrc/cuda/linear.cu"]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bitpalette_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_path(name: str) -> str | None:
    return "/usr/bin/nvcc" if name == "nvcc" else None


def nowhere(name: str) -> None:
    return None


def test_cuda_is_built_where_nvcc_and_sources_are(build: ModuleType) -> None:
    decision = build.decide_cuda({}, on_path, KERNELS)
    assert decision.nvcc == "/usr/bin/nvcc"
    assert "sm_80, sm_90 with" in decision.message
    assert build.decide_cuda({"BITPALETTE_CUDA": "1"}, on_path, KERNELS) == decision


def test_architectures(build: ModuleType) -> None:
    assert build.cuda_architectures({}) == build.CUDA_ARCHITECTURES
    assert build.cuda_architectures({"BITPALETTE_CUDA_ARCHITECTURES": "80;89"}) == ("80", "89")
    decision = build.decide_cuda({"BITPALETTE_CUDA_ARCHITECTURES": "90"}, on_path, KERNELS)
    assert decision.architectures == ("90",) and "sm_90 with" in decision.message
    flags = build.gencode(("80", "90"))
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90" and len(flags) == 3
    for wish in ("75", "sm_90", "90;", "8 0"):
        with pytest.raises(SystemExit, match=r"BITPALETTE_CUDA_ARCHITECTURES=.* no compute capability from 80 on"):
            build.cuda_architectures({"BITPALETTE_CUDA_ARCHITECTURES": wish})


def test_cuda_home_comes_before_the_path(build: ModuleType) -> None:
    decision = build.decide_cuda({"CUDA_HOME": "/opt/cuda"}, lambda name: name, KERNELS)
    assert decision.nvcc == "/opt/cuda/bin/nvcc"
    assert build.decide_cuda({"CUDA_HOME": "/opt/cuda"}, on_path, KERNELS).nvcc == "/usr/bin/nvcc"


@pytest.mark.parametrize(
    ("environ", "which", "sources", "message"),
    [
        ({}, nowhere, KERNELS, "no nvcc found"),
        ({}, on_path, [], "no CUDA sources in this version"),
        ({"BITPALETTE_CUDA": "0"}, on_path, KERNELS, "BITPALETTE_CUDA=0"),
    ],
)
def test_build_without_cuda_says_so_in_one_line(build, environ, which, sources, message) -> None:  # type: ignore[no-untyped-def]
    decision = build.decide_cuda(environ, which, sources)
    assert decision.nvcc is None
    assert message in decision.message
    assert "CPU extension only" in decision.message
    assert "\n" not in decision.message


@pytest.mark.parametrize(
    ("wish", "which", "sources", "message"),
    [
        ("1", nowhere, KERNELS, "needs nvcc"),
        ("1", on_path, [], "no CUDA sources"),
        ("yes", on_path, KERNELS, "got 'yes'"),
    ],
)
def test_a_demand_that_cannot_be_met_fails_in_one_line(build, wish, which, sources, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit, match=message) as failure:
        build.decide_cuda({"BITPALETTE_CUDA": wish}, which, sources)
    assert str(failure.value).startswith("bitpalette: ")
    assert "\n" not in str(failure.value)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    for name in ("bind/cpu_module", "cpu/pool", "cpu/int4_avx512", "cpu/int4_avx2", "cpu/int4_neon", "cpu/int4_scalar"):
        path = tmp_path / "csrc" / f"{name}.cpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "sets"),
    [
        ("x86_64", {"avx512", "avx2", "scalar"}),
        ("aarch64", {"neon", "scalar"}),
        ("arm64", {"neon", "scalar"}),
        ("riscv64", {"scalar"}),
    ],
)
def test_sources_follow_the_machine(build: ModuleType, native: Path, machine: str, sets: set[str]) -> None:
    sources = build.cpu_sources(native, machine)
    assert sources[0] == "csrc/bind/cpu_module.cpp"
    assert set(sources[1:]) == {"csrc/cpu/pool.cpp"} | {f"csrc/cpu/int4_{name}.cpp" for name in sets}


def test_flags_follow_the_file_name(build: ModuleType) -> None:
    assert build.isa_flags("csrc/cpu/pool.cpp") == []
    assert build.isa_flags("csrc/cpu/int4_scalar.cpp") == []
    assert build.isa_flags("csrc/cpu/int4_neon.cpp") == ["-march=armv8.2-a+dotprod"]
    assert build.isa_flags("csrc/cpu/int4_avx2.cpp") == ["-mavx2", "-mfma", "-mf16c"]
    assert "-mavx512vnni" in build.isa_flags("csrc/cpu/int4_avx512.cpp")
    assert "-mavx512vbmi" not in build.isa_flags("csrc/cpu/int4_avx512.cpp")
    assert build.isa_flags("csrc/cpu/x_avx512vbmi.cpp") == [*build.isa_flags("csrc/cpu/x_avx512.cpp"), "-mavx512vbmi"]
    assert not any("native" in flag for flag in build.CXX_FLAGS)


def test_missing_native_sources_fail_in_one_line(build: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"csrc/bind/cpu_module\.cpp is missing"):
        build.cpu_sources(tmp_path, "x86_64")
