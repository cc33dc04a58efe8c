"""csrc/cpu for aarch64: cross-compiled, and every kernel run by an emulator, NEON against scalar.

The compiler is aarch64-linux-gnu-g++ where there is one, else zig from the wheel `ziglang` (extra `test`); the emulator
is qemu-user (Debian: qemu-user-static). On an aarch64 machine its own compiler is used and nothing is emulated.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "tests/csrc/instruction_sets.cpp"
NATIVE = platform.machine() in ("aarch64", "arm64")
ZIG_FLAGS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod"}
"""zig has its own words for instruction sets."""


def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bitpalette_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compilers() -> Iterator[list[str]]:
    """Commands that compile and link C++ for aarch64, the preferred first."""
    for name in ("c++", "g++", "clang++") if NATIVE else ("aarch64-linux-gnu-g++",):
        if shutil.which(name) is not None:
            yield [name]
    if not NATIVE and importlib.util.find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]


def emulator() -> list[str] | None:
    """What runs the program; None where nothing does."""
    if NATIVE:
        return []
    # every instruction that this emulator knows: the run-time check has to find the dot product by itself
    found = next((path for name in ("qemu-aarch64-static", "qemu-aarch64") if (path := shutil.which(name))), None)
    return None if found is None else [found, "-cpu", "max"]


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    found = next(compilers(), None)
    if found is None:
        pytest.skip("no compiler for aarch64: install g++-aarch64-linux-gnu or the wheel ziglang")
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def objects(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All of csrc/cpu and the driver; fails where anything does not compile."""
    build, folder = build_script(), tmp_path_factory.mktemp("aarch64")
    sources = [name for name in build.cpu_sources(ROOT, "aarch64") if name.startswith("csrc/cpu/")]
    assert any(name.endswith("_neon.cpp") for name in sources)
    sources.sort(key=lambda name: "codes_" not in name)  # those that take longest first

    def compiled(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.o")
        flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
        isa = build.isa_flags(source)
        if "ziglang" in compiler:  # -O1 takes 27 s for the longest file; -O0 alone adds checks of undefined behaviour
            flags += ["-O0", "-fno-sanitize=undefined"]
            isa = [ZIG_FLAGS.get(flag, flag) for flag in isa]
        else:  # a quarter of what -O3 takes
            flags.append("-O1")
        run([*compiler, *flags, *isa, "-c", str(ROOT / source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, [*sources, DRIVER]))


@pytest.fixture(scope="module")
def program(compiler: list[str], objects: list[str]) -> str:
    """Statically linked, which an emulator needs; zig builds its libraries for it first, which takes minutes."""
    if emulator() is None:
        pytest.skip("no emulator of aarch64: install qemu-user-static (or qemu-user)")
    target = str(Path(objects[0]).parent / "instruction_sets")
    static = [] if sys.platform == "darwin" else ["-static"]
    run([*compiler, *static, *objects, "-o", target, "-pthread"])
    return target


@pytest.mark.slow
def test_all_of_it_compiles(objects: list[str]) -> None:
    assert all(Path(name).is_file() for name in objects)


@pytest.mark.slow
def test_neon_does_what_scalar_does(program: str) -> None:
    command = [*(emulator() or []), program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-4000:]
    names, _, counts = done.stdout.partition(": ")
    assert names == "scalar neon" and counts.endswith(" comparisons, 0 differences\n"), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(NATIVE, reason="this machine's instructions are all there; an emulator can leave some out")
def test_a_processor_without_the_dot_product_gets_scalar(program: str) -> None:
    command = [(emulator() or [""])[0], "-cpu", "cortex-a72", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "scalar: 0 comparisons, 0 differences\n")
