"""Builds the native modules `bitpalette._cpu` and `bitpalette._cuda`; all else is in pyproject.toml.

What is compiled, and for which instructions, is read from file names: `csrc/cpu/*_avx512.cpp` is compiled with AVX-512
on x86-64 and left out elsewhere, a file without such a suffix is compiled for the baseline of the machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
JOBS = max(2, min(os.cpu_count() or 2, 8))  # compilers at a time: one of nvcc's takes up to 2 GB

X86_64 = ("x86_64", "AMD64")
AARCH64 = ("aarch64", "arm64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]

NEW_FLAGS = ("-mavxvnni",)  # GCC 11, Clang 12

# file-name suffix -> (machines that compile it, flags). No -march=native: a wheel runs on other machines than its own,
# and the set of instructions is chosen at run time.
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "avx512vbmi": (X86_64, [*AVX512, "-mavx512vbmi"]),
    "avx512": (X86_64, AVX512),
    "avxvnni": (X86_64, [*AVX2, "-mavxvnni"]),
    "avx2": (X86_64, AVX2),
    "neon": (AARCH64, ["-march=armv8.2-a+dotprod"]),
    "scalar": (X86_64 + AARCH64, []),
}
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# sm_80's code runs on 8.6 and 8.9 too; later GPUs compile the PTX of the last when it is first used
CUDA_ARCHITECTURES = ("80", "90")


def instruction_set(source: str) -> str | None:
    """The instruction set in a file's name, `avx512` for csrc/cpu/int4_avx512.cpp; None for the baseline."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in INSTRUCTION_SETS else None


def isa_flags(source: str) -> list[str]:
    """Compiler flags of one source file beyond those of all files."""
    name = instruction_set(source)
    return [] if name is None else INSTRUCTION_SETS[name][1]


def cpu_sources(root: Path, machine: str) -> list[str]:
    """Sources of `bitpalette._cpu` for a machine (as platform.machine() says it), relative to root, sorted.

    An unknown machine gets the files without an instruction set and the scalar ones.
    """
    module = "csrc/bind/cpu_module.cpp"
    if not (root / module).is_file():
        raise SystemExit(f"bitpalette: {module} is missing in {root}: build from a clone or a source distribution")
    names = [p.relative_to(root).as_posix() for p in sorted((root / "csrc/cpu").glob("*.cpp"))]
    wanted = []
    for name in names:
        isa = instruction_set(name)
        if isa in (None, "scalar") or machine in INSTRUCTION_SETS[isa][0]:
            wanted.append(name)
    parts = [p.relative_to(root).as_posix() for p in sorted((root / "csrc/bind").glob("cpu_*.cpp"))]
    return [module, *(part for part in parts if part != module), *wanted]


class CudaDecision(NamedTuple):
    """nvcc: path of the compiler to build with, None to build no CUDA module; message: one line for the user."""

    nvcc: str | None
    message: str
    architectures: tuple[str, ...] = ()


def cuda_architectures(environ: Mapping[str, str]) -> tuple[str, ...]:
    """BITPALETTE_CUDA_ARCHITECTURES, such as "90" or "80;89", else `CUDA_ARCHITECTURES`. SystemExit for others."""
    wish = environ.get("BITPALETTE_CUDA_ARCHITECTURES", "")
    chosen = tuple(wish.replace(",", ";").split(";")) if wish else CUDA_ARCHITECTURES
    for name in chosen:
        if not re.fullmatch(r"[89]\d|1\d\d", name):
            raise SystemExit(
                f"bitpalette: BITPALETTE_CUDA_ARCHITECTURES={wish!r}: {name!r} is no compute capability from 80 on; "
                "give numbers such as 80;90"
            )
    return chosen


def gencode(architectures: Iterable[str]) -> list[str]:
    """nvcc's flags: machine code for each, and the last one's PTX."""
    names = list(architectures)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def decide_cuda(environ: Mapping[str, str], which: Callable[[str], str | None], sources: Iterable[str]) -> CudaDecision:
    """Whether the CUDA module is built. BITPALETTE_CUDA: 0 never, 1 demands it, unset where nvcc and sources exist.

    Raises SystemExit with one line where the demand cannot be met; nothing falls back in silence.
    """
    wish = environ.get("BITPALETTE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"bitpalette: BITPALETTE_CUDA is 0, 1 or unset; got {wish!r}")
    if wish == "0":
        return CudaDecision(None, "bitpalette: BITPALETTE_CUDA=0, the CPU extension only")
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = (which(str(Path(home, "bin", "nvcc"))) if home else None) or which("nvcc")
    if nvcc is None:
        if wish == "1":
            raise SystemExit(
                "bitpalette: BITPALETTE_CUDA=1 needs nvcc, found neither on PATH nor in CUDA_HOME "
                f"({home or 'unset'}): install the CUDA toolkit or unset BITPALETTE_CUDA"
            )
        return CudaDecision(None, "bitpalette: no nvcc found, the CPU extension only; on a GPU Triton is used")
    if not list(sources):
        if wish == "1":
            raise SystemExit("bitpalette: BITPALETTE_CUDA=1, but this version has no CUDA sources: unset it")
        return CudaDecision(None, "bitpalette: no CUDA sources in this version, the CPU extension only")
    architectures = cuda_architectures(environ)
    names = ", ".join(f"sm_{a}" for a in architectures)
    return CudaDecision(nvcc, f"bitpalette: CUDA module for {names} with {nvcc}", architectures)


def headers(root: Path, folders: Iterable[str]) -> list[str]:
    """Every header in these folders of csrc/, and this file: a change of one of them rebuilds."""
    found = (p for name in folders for p in (root / "csrc" / name).rglob("*") if p.suffix in (".h", ".hpp", ".cuh"))
    return ["setup.py", *(p.relative_to(root).as_posix() for p in sorted(found))]


def native_module(name: str, sources: list[str], folders: Iterable[str]) -> Extension:
    import pybind11  # here, so that the functions above need no build requirement

    return Extension(
        name,
        sources,
        include_dirs=["csrc", pybind11.get_include()],
        depends=headers(ROOT, folders),
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-pthread"],
        language="c++",
    )


class BuildNative(build_ext):
    """setuptools compiles all sources of a module with the same flags, one after another; this takes flags by file."""

    cuda = CudaDecision(None, "")

    def run(self) -> None:
        print(self.cuda.message, file=sys.stderr)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            kind = self.compiler.compiler_type
            raise SystemExit(
                f"bitpalette: build with GCC or Clang, whose flags setup.py uses; got compiler type {kind!r}"
            )
        target = self.get_ext_fullpath(ext.name)
        compile_one, link = (
            (self._compile_cuda, self._link_cuda) if ext.name.endswith("._cuda") else (self._compile, self._link)
        )
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda source: compile_one(ext, source), ext.sources))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link(ext, objects, target)

    def _fresh(self, ext: Extension, source: str, built: str) -> bool:
        return not self.force and not newer_group([source, *ext.depends], built, "newer")

    def _compile(self, ext: Extension, source: str) -> str:
        [built] = self.compiler.object_filenames([source], output_dir=self.build_temp)
        if not self._fresh(ext, source, built):
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args + [f for f in isa_flags(source) if self._knows(f)],
            )
        return str(built)

    def _knows(self, flag: str) -> bool:
        """Whether the compiler has a flag that older ones lack: csrc/cpu/isa.h leaves out what is compiled with it."""
        if flag not in NEW_FLAGS:
            return True
        command = [*self.compiler.compiler_so, flag, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _link(self, ext: Extension, objects: list[str], target: str) -> None:
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=self.get_libraries(ext),
            export_symbols=self.get_export_symbols(ext),
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _compile_cuda(self, ext: Extension, source: str) -> str:
        built = str(Path(self.build_temp, source).with_suffix(".o"))
        if not self._fresh(ext, source, built):
            Path(built).parent.mkdir(parents=True, exist_ok=True)
            include = [f"-I{path}" for path in [*ext.include_dirs, *self.compiler.include_dirs]]
            # the bindings call launchers and have no kernels of their own: any one architecture does
            kernels = source.startswith("csrc/cuda/")
            code = gencode(self.cuda.architectures if kernels else self.cuda.architectures[:1])
            self.spawn([self.cuda.nvcc, *NVCC_FLAGS, *code, *include, "-x", "cu", "-c", source, "-o", built])
        return built

    def _link_cuda(self, ext: Extension, objects: list[str], target: str) -> None:
        # linked by nvcc, which knows where its runtime is: nvcc on PATH may be a wrapper outside the toolkit
        self.spawn([self.cuda.nvcc, "-shared", *NVCC_FLAGS, *objects, "-o", target])


def main() -> None:
    modules = [native_module("bitpalette._cpu", cpu_sources(ROOT, platform.machine()), ["cpu", "bind"])]
    kernels = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    BuildNative.cuda = decide_cuda(os.environ, shutil.which, kernels)
    if BuildNative.cuda.nvcc:
        sources = ["csrc/bind/cuda_module.cpp", *kernels]
        modules.append(native_module("bitpalette._cuda", sources, ["cuda", "cpu", "bind"]))
    setup(ext_modules=modules, cmdclass={"build_ext": BuildNative})


if __name__ == "__main__":
    main()
