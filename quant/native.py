"""The native CPU module, where it was built, and the instruction set that it runs with.

The one place that imports it: encoders of this folder and the kernels take it from here.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from types import ModuleType

import torch

ISA_VARIABLE = "BITPALETTE_CPU_ISA"


class NativeError(RuntimeError):
    """The native module, or an instruction set of it, is not there. The message says what to do."""


_cpu: ModuleType | None
try:
    from .. import _cpu  # type: ignore[attr-defined, no-redef]

    import_error = ""
except ImportError as error:  # built without a compiler, or for another Python: the reference runs, and says why
    _cpu, import_error = None, str(error)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Activation dtypes by the number that csrc knows them by (csrc/cpu/dtype.h)."""


def why_no_cpu_module() -> str | None:
    """None where bitpalette._cpu is there, else why not, and what to do."""
    if _cpu is None:
        return f"the CPU extension is not built ({import_error}); `pip install .` builds it with any C++17 compiler"
    return None


def cpu_module() -> ModuleType:
    """bitpalette._cpu, ready to use torch's threads. NativeError where it was not built."""
    if _cpu is None:
        raise NativeError(str(why_no_cpu_module()))
    _share_threads()
    return _cpu


def available_isas() -> list[str]:
    """Instruction sets that the native module can use on this machine, slowest first; empty where it is not built."""
    return [] if _cpu is None else list(_cpu.isas())


@cache
def isa_index(name: str) -> int:
    """The number of an instruction set. NativeError where this machine or build lacks it."""
    isas = cpu_module().isas()
    if name not in isas:
        raise NativeError(f"instruction set {name!r}: this machine runs {list(isas)} (set by {ISA_VARIABLE})")
    return isas[name]


def chosen_isa() -> str:
    """The fastest instruction set here, or the one that BITPALETTE_CPU_ISA forces. NativeError without the module."""
    cpu_module()
    return os.environ.get(ISA_VARIABLE) or available_isas()[-1]


@cache
def _share_threads() -> None:
    """Hand the native module the OpenMP runtime that torch runs on, so that both use one pool of threads.

    Found among the libraries this process has loaded (Linux only); without one, native code runs on one thread.
    """
    for path in _loaded_libraries():
        name = os.path.basename(path)
        if not name.startswith(("libgomp", "libiomp5", "libomp")):
            continue
        library = ctypes.CDLL(path)  # already loaded: this only takes a handle
        try:
            entries = [library[symbol] for symbol in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
        except AttributeError:
            continue
        assert _cpu is not None
        _cpu.use_openmp_runtime(*(ctypes.cast(entry, ctypes.c_void_p).value for entry in entries))
        return


def _loaded_libraries() -> list[str]:
    """Paths of the shared libraries in this process; those beside torch first, since there may be two runtimes."""
    try:
        with open("/proc/self/maps") as maps:
            fields = (line.rstrip("\n").split(maxsplit=5) for line in maps)
            paths = {f[5] for f in fields if len(f) == 6 and ".so" in f[5]}
    except OSError:
        return []
    home = os.path.dirname(torch.__file__)
    return sorted(paths, key=lambda path: (not path.startswith(home), path))
