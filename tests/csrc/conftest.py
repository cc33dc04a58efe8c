"""Native test programs built with sanitizers: every source of csrc/cpu, compiled once a session for each of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from bitpalette.quant.native import available_isas

ROOT = Path(__file__).resolve().parents[2]
# at -O0: with sanitizers, -O1 takes three times as long to compile, which is most of what a run takes
FLAGS = ["-std=c++17", "-O0", "-g1", "-w", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
SANITIZERS = {
    # with _GLIBCXX_SANITIZE_VECTOR, what lies between a vector's size and its capacity is out of bounds
    "memory": ["-fsanitize=address,undefined", "-D_GLIBCXX_SANITIZE_VECTOR"],
    "threads": ["-fsanitize=thread"],
}
# AVX-VNNI in the encoding of AVX-512, where that is what the machine has: see csrc/cpu/dot_avxvnni.h
BY_AVX512 = "-DBITPALETTE_AVXVNNI_IS_AVX512"
# units of a thousand inlined vector functions, whose stack slots take a minute to guard: heap and statics only
UNGUARDED_STACK = ("codes_avx2", "codes_avxvnni", "codes_avx512")


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bitpalette_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """sanitized("memory" or "threads", NAME): tests/csrc/NAME.cpp as a program, with all of csrc/cpu."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    setup = _setup()
    sources = [s for s in setup.cpu_sources(ROOT, platform.machine()) if s.startswith("csrc/cpu/")]
    sources.sort(key=lambda source: "codes_" not in source)  # the longest first

    def compile_one(source: str, flags: list[str], folder: Path) -> str:
        built = str(folder / f"{Path(source).stem}.o")
        own = setup.isa_flags(source)
        if {"avx512", "avxvnni"} & set(available_isas()) == {"avx512"}:
            own = [BY_AVX512, *(setup.AVX512 + setup.AVX2 if "-mavxvnni" in own else own)]
        if "-fsanitize=thread" not in flags and Path(source).stem in UNGUARDED_STACK:
            own = [*own, "--param", "asan-stack=0"]
        subprocess.run(["g++", *flags, *own, "-c", str(ROOT / source), "-o", built], check=True)
        return built

    @cache
    def library(kind: str) -> tuple[Path, list[str]]:
        folder, flags = tmp_path_factory.mktemp(kind), [*FLAGS, *SANITIZERS[kind]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return folder, list(pool.map(lambda source: compile_one(source, flags, folder), sources))

    def program(kind: str, name: str) -> Path:
        folder, objects = library(kind)
        flags = [*FLAGS, *SANITIZERS[kind]]
        main = compile_one(f"tests/csrc/{name}.cpp", flags, folder)
        subprocess.run(["g++", *flags, main, *objects, "-o", str(folder / name), "-pthread"], check=True)
        return folder / name

    return program
