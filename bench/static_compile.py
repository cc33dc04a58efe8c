"""Compiles CUDA sources without a GPU, and reads what came of it: registers, spills, launch bounds, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from static_kernels import CUDA, Kernel, demangle, kernel, trellis_encode
from static_sass import Instruction, functions

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
FLAGS = ["-std=c++17", "-O3"]  # of setup.py, without what is for the host
ENCODER = "trellis_encode"
ENCODER_RATES = [(16, 16), (27, 12), (32, 16), (40, 16), (48, 14), (64, 14), (80, 16)]  # (row_bits, window)


class ToolError(RuntimeError):
    """A compiler or disassembler is missing, or refused."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. spill: bytes stored and loaded; stack, shared: bytes, shared the static part.

    threads and blocks are the launch bounds: the most threads of a block, the fewest blocks a multiprocessor holds.
    """

    kernel: Kernel
    file: str
    arch: str
    registers: int
    spill: int
    stack: int
    shared: int
    threads: int
    blocks: int
    code: Sequence[Instruction]


def tool(name: str) -> str:
    """Path of cuobjdump or nvcc: of the toolkit on PATH, else of the triton wheel, which has the disassemblers."""
    if found := shutil.which(name):
        return found
    spec = find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder, "backends", "nvidia", "bin", name)
        if candidate.is_file():
            return str(candidate)
    raise ToolError(
        f"{name} is neither on PATH nor in a triton wheel: install the CUDA toolkit or `pip install triton`"
    )


@cache
def compiler_version() -> str:
    """ "nvcc 13.0.88", with the ptxas that comes with it."""
    text = _run([tool("nvcc"), "--version"]).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return f"nvcc {found[1] if found else 'of unknown version'}"


def sources() -> list[str]:
    """Stems of what can be compiled: csrc/cuda/*.cu, and the encoder."""
    return [*sorted(path.stem for path in CUDA.glob("*.cu")), ENCODER]


def compile_source(stem: str, arch: str, flags: Sequence[str] = ()) -> list[Compiled]:
    """All kernels of csrc/cuda/<stem>.cu, or the encoder at its rates, for one architecture, in the table's order.

    ToolError where nvcc refuses; UnknownKernelError for a kernel that static_kernels.py does not know.
    """
    if stem == ENCODER:
        return [_encoder(row_bits, window, arch, flags) for row_bits, window in ENCODER_RATES]
    return compile_file(CUDA / f"{stem}.cu", arch, flags)


def compile_file(path: Path, arch: str, flags: Sequence[str] = (), name: Kernel | None = None) -> list[Compiled]:
    """The same of any file; name: of its only kernel, where the template's name does not say it."""
    with tempfile.TemporaryDirectory(prefix="static-") as folder:
        cubin = Path(folder, "kernel.cubin")
        command = [tool("nvcc"), *FLAGS, *flags, f"-arch={arch}", "-I", str(CUDA), "-cubin", "-Xptxas", "-v"]
        log = _run([*command, "--keep", "--keep-dir", folder, "-o", str(cubin), str(path)]).stderr
        ptx = "\n".join(p.read_text() for p in Path(folder).glob("*.ptx"))
        sass = _run([tool("cuobjdump"), "-sass", str(cubin)]).stdout
    usage, bounds, code = resource_usage(log), launch_bounds(ptx), functions(sass)
    plain = demangle(usage)
    found = [
        Compiled(name or kernel(plain[mangled]), path.stem, arch, *numbers, *bounds[mangled], code[mangled])
        for mangled, numbers in usage.items()
    ]
    return sorted(found, key=lambda c: (c.kernel.family, c.kernel.order))


def _encoder(row_bits: int, window: int, arch: str, flags: Sequence[str]) -> Compiled:
    from bitpalette.quant.trellis_cuda import Launch, source  # here: it imports torch

    launch = Launch(row_bits, window)
    with tempfile.TemporaryDirectory(prefix="static-") as folder:
        path = Path(folder, f"{ENCODER}.cu")
        path.write_text(source().replace("#pragma once", ""))
        [found] = compile_file(path, arch, [*launch.options, *flags], trellis_encode(row_bits, window))
    return found


def resource_usage(log: str) -> dict[str, tuple[int, int, int, int]]:
    """{mangled name: (registers, spill bytes, stack bytes, static shared bytes)} of what `ptxas -v` says."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if frame is None or used is None:
            raise ToolError(f"ptxas -v says nothing of the registers of {name}: a version with another output?")
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = (int(used[1]), int(frame[2]) + int(frame[3]), int(frame[1]), int(shared[1]) if shared else 0)
    return found


def launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """{mangled name: (threads, blocks)} from the directives behind .entry; 1024 and 1 where there are none."""
    found = {}
    for match in re.finditer(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", ptx, re.DOTALL):
        threads = re.search(r"\.maxntid (\d+)", match[2])
        blocks = re.search(r"\.minnctapersm (\d+)", match[2])
        found[match[1]] = (int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else 1)
    return found


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line.lower()]
        raise ToolError(f"{Path(command[0]).name} refuses {command[-1]}: {said[0] if said else done.stderr.strip()}")
    return done
