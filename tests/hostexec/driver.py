"""Builds kernels for the host executor and runs them: plain in this process, under a sanitizer in one of its own.

    library = executor.build([CUDA / "gemm.cu", Path(__file__).with_name("gemm_entry.cpp")])
    y = Guarded(np.full((n, m), np.nan, np.float32))
    for options in all_options():
        library.call("run_gemm", Guarded(w), Guarded(x), y, n, k, options=options)

An entry point is an `extern "C" int` function that gets pointers and integers and returns what the launcher returned.
Tests get the executor as the fixture `hostexec`.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
CORE = ("hostexec.cpp", "scheduler.cpp", "meeting.cpp", "warp_ops.cpp", "shared_memory.cpp")
SCHEDULES = ("forward", "reverse", "greedy_low", "greedy_high", "random")
COPIES = ("lazy", "eager", "mixed")
MODES = ("plain", "asan", "tsan")
ALIGNMENT = 256  # cudaMalloc's
GUARD = 16384  # bytes of NaN before and behind every buffer; a kernel that writes further may crash the process

# ffp-contract: nvcc fuses where it likes, the executor never, so that all of its modes agree.
# no-tree-loop-distribute-patterns: no hidden calls of memcpy, which ThreadSanitizer intercepts.
_FLAGS = [
    *("-std=c++17", "-fPIC", "-g1", "-w", "-DBITPALETTE_HOST_EXECUTOR"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-fno-tree-loop-distribute-patterns"),
]
_KERNEL = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
_CORE = {"plain": ["-O3", "-march=native"], "asan": _KERNEL["asan"], "tsan": ["-O2", "-DHOSTEXEC_TSAN"]}
_LINK = {"plain": [], "asan": ["-fsanitize=address,alignment"], "tsan": ["-fsanitize=thread"]}


class LaunchError(RuntimeError):
    """The executor, or the launcher, refused or stopped a launch. The text is the executor's."""


class OutOfBoundsError(AssertionError):
    """Something was written before or behind a buffer."""


class IsolatedError(RuntimeError):
    """A sanitizer, or the check itself, failed in a process of its own. The text is its output."""


@dataclass(frozen=True)
class Options:
    """How a launch runs: the order of threads, when asynchronous copies happen, how many blocks are alive at once."""

    schedule: str = "forward"
    seed: int = 0
    copies: str = "lazy"
    coresident: int = 1
    conflicts: bool = False  # count bank conflicts of lds and sts as well as of ldmatrix

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES or self.copies not in COPIES or self.coresident < 1:
            raise ValueError(f"{self}: schedule is one of {SCHEDULES}, copies one of {COPIES}, coresident at least 1")


def all_options(coresident: int = 1) -> Iterator[Options]:
    """Every schedule with both extremes of copies, what a plain run of a kernel should pass; one under a sanitizer.

    ThreadSanitizer does not need them to find a race, only one in which copies come late.
    """
    for schedule, copies in itertools.product(SCHEDULES if _mode() == "plain" else ("forward",), ("lazy", "eager")):
        yield Options(schedule, seed=1, copies=copies, coresident=coresident)


class Guarded:
    """A copy of a numpy array or torch tensor, aligned as cudaMalloc does, with bytes of 0xff (NaN) on both sides.

    `array` (and `tensor`, of a tensor) is the copy itself, to be read after a call. Under a sanitizer, which watches
    the ends itself, there are no guards.
    """

    def __init__(self, data: Any) -> None:
        self._torch: Any = None
        if hasattr(data, "data_ptr"):
            import torch

            self._torch = (data.dtype, tuple(data.shape))
            data = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = np.ascontiguousarray(data)
        self._guard = GUARD if _mode() == "plain" else 0
        size = data.nbytes
        self._memory = np.full(size + 2 * self._guard + (ALIGNMENT if self._guard else 0), 0xFF, np.uint8)
        address = self._memory.ctypes.data
        self._first = self._guard + (-(address + self._guard) % ALIGNMENT if self._guard else 0)
        if (address + self._first) % 16 != 0:
            raise MemoryError(f"numpy's memory at {address:#x} is not aligned to 16 bytes")
        self._end = self._first + size
        self.array = self._memory[self._first : self._end].view(data.dtype).reshape(data.shape)
        self.array[...] = data
        self.pointer = address + self._first

    @property
    def tensor(self) -> Any:
        import torch

        dtype, shape = self._torch
        return torch.from_numpy(self.array).view(dtype).reshape(shape)

    def check(self) -> None:
        """Raises OutOfBoundsError if a guard is no longer what it was."""
        for side, part in (("before", self._memory[: self._first]), ("behind", self._memory[self._end :])):
            changed = np.flatnonzero(part != 0xFF)
            if changed.size:
                distance = part.size - changed[-1] if side == "before" else changed[0]
                raise OutOfBoundsError(
                    f"{changed.size} bytes written {side} a buffer of {self._end - self._first} bytes,"
                    f" the nearest {distance} bytes from it"
                )


class Library:
    """A built kernel. Not for two threads at once: the executor is one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.hostexec_error.restype = ctypes.c_char_p

    def call(self, name: str, *args: Any, options: Options | None = None) -> None:
        """Calls `int name(args...)`: Guarded as a pointer, None as a null pointer, int as an integer, ctypes as is.

        Raises LaunchError with the executor's message, or OutOfBoundsError.
        """
        o = options or Options()
        self._library.hostexec_configure(
            SCHEDULES.index(o.schedule),
            ctypes.c_ulonglong(o.seed),
            COPIES.index(o.copies),
            o.coresident,
            int(o.conflicts),
        )
        code = getattr(self._library, name)(*(_c_value(arg) for arg in args))
        if code != 0:
            text = self._library.hostexec_error().decode(errors="replace")
            raise LaunchError(f"{text or f'{name} returned {code}'} [{o.schedule}, seed {o.seed}, copies {o.copies}]")
        for arg in args:
            if isinstance(arg, Guarded):
                arg.check()

    def conflicts(self) -> dict[tuple[str, int, str], tuple[int, int]]:
        """Of the last call: (file, line, "ldmatrix" | "lds" | "sts") -> (accesses of a warp, passes too many)."""
        size = self._library.hostexec_conflicts(None, 0) + 1
        text = ctypes.create_string_buffer(size)
        self._library.hostexec_conflicts(text, size)
        rows = [line.rsplit(" ", 4) for line in text.value.decode().splitlines()]
        return {(file, int(line), kind): (int(n), int(extra)) for file, line, kind, n, extra in rows}


def _c_value(arg: Any) -> Any:
    if isinstance(arg, Guarded):
        return ctypes.c_void_p(arg.pointer)
    if isinstance(arg, (bool, int, np.integer)):
        return ctypes.c_longlong(int(arg))  # a narrower parameter takes its low part, in a register or on the stack
    return arg


def _mode() -> str:
    return os.environ.get("HOSTEXEC_MODE", "plain")


@cache
def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise FileNotFoundError("the host executor needs g++: install it, or name a compiler in CXX")
    return found


class Executor:
    """Builds into `folder`, each thing once for the same sources, also when several processes build at once.

    Also this file's names, for tests and checks that cannot import it: hostexec.guarded(..), hostexec.Options(..).
    """

    Options = Options
    LaunchError = LaunchError
    OutOfBoundsError = OutOfBoundsError
    IsolatedError = IsolatedError
    guarded = Guarded
    all_options = staticmethod(all_options)

    def __init__(self, folder: Path) -> None:
        self.mode = _mode()  # of this process: checks choose smaller shapes under a sanitizer
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def build(self, sources: Sequence[Path], mode: str | None = None, defines: Sequence[str] = ()) -> Library:
        """The library of these .cu and .cpp files with the executor. The mode is that of the process."""
        return Library(self.build_path(sources, mode or _mode(), defines))

    def build_path(
        self, sources: Sequence[Path], mode: str, defines: Sequence[str] = (), includes: Sequence[str] = ()
    ) -> Path:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: one of {MODES}")
        flags = [*_FLAGS, f"-I{CUDA}", f"-I{HERE}", *(f"-D{define}" for define in defines)]
        flags += [f"-I{folder}" for folder in includes]
        objects = [self._object(HERE / name, [*_FLAGS, *_CORE[mode]]) for name in CORE]
        with ThreadPoolExecutor(2) as pool:  # compilers, each a process
            objects += pool.map(lambda source: self._object(source, [*flags, *_KERNEL[mode]]), sources)
        target = self.folder / f"lib{_digest(*(o.name for o in objects))}.so"
        if not target.exists():
            self._run(["-shared", *_LINK[mode], *map(str, objects)], target)
        return target

    def _object(self, source: Path, flags: list[str]) -> Path:
        # headers of the folders that can be included from: cheap to read, safe to know
        folders = {CUDA, HERE, source.parent}
        headers = sorted(p for f in folders for p in f.iterdir() if p.suffix in {".h", ".cuh"})
        target = self.folder / f"{_digest(*flags, source, *headers)}.o"
        if not target.exists():
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            self._run(["-c", *flags, *language, str(source)], target)
        return target

    def _run(self, arguments: list[str], target: Path) -> None:
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([_compiler(), *arguments, "-o", str(beside)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join([_compiler(), *arguments])}\n{done.stderr}")
        os.replace(beside, target)

    def isolated(self, mode: str, function: Callable[..., None], *args: Any, timeout: float = 300.0) -> None:
        """function(executor, *args) in a process of its own where every build has the sanitizer of `mode`.

        The function is found again by its file and name, so it stands at the top of its file; args are JSON. Raises
        IsolatedError with the output if the sanitizer reports anything or the function raises.
        """
        call = [function.__code__.co_filename, function.__name__, json.dumps(args), str(self.folder)]
        command = [sys.executable, str(HERE / "isolated.py"), *call]
        if mode == "tsan" and shutil.which("setarch"):
            command = ["setarch", "-R", *command]  # its shadow memory wants addresses of its own
        done = subprocess.run(
            command, env=_sanitizer_environment(mode), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode != 0:
            raise IsolatedError(f"{mode}, exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def _sanitizer_environment(mode: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "HOSTEXEC_MODE": mode,
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Python keeps what it likes at exit: no leaks
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=66",
        "TSAN_OPTIONS": "halt_on_error=0:exitcode=66:ignore_noninstrumented_modules=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    if mode != "plain":
        name = {"asan": "libasan.so", "tsan": "libtsan.so"}[mode]
        found = subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            raise FileNotFoundError(f"{_compiler()} has no {name}: install the sanitizers of this compiler")
        environment["LD_PRELOAD"] = found
    return environment


def _digest(*parts: str | Path) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        state.update(f"{len(data)} {part if isinstance(part, str) else part.name} ".encode() + data)
    return state.hexdigest()[:24]
