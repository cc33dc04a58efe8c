"""ggml's matrix product, through the libggml that llama-cpp-python brings: one graph of one node for each copy.

The functions are those of ggml.h and ggml-backend.h. A type that ggml's CPU backend can lay out anew ("repack", which
llama.cpp does when it loads a model) takes part in both layouts.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_weight import Source
from torch import Tensor

from bitpalette.kernel_bench.contender import Absent, Call, Contender

HOW = "pip install llama-cpp-python (builds for this machine, some minutes)"

F32 = 0
TYPES = {"Q4_0": 2, "Q4_K": 12, "Q2_K": 10, "IQ2_XS": 17, "IQ3_S": 21, "Q8_0": 8}
"""enum ggml_type"""


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_log_set": (None, (LogCallback, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead": (c_size_t, ()),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
}


class Ggml:
    """The functions of SIGNATURES, a CPU backend, and the buffer types it has for weights."""

    def __init__(self, folder: Path) -> None:
        """OSError where the libraries are not there, AttributeError where they lack a function."""
        suffix = next((p.suffix for p in folder.glob("*ggml-base.*") if p.suffix in (".so", ".dylib", ".dll")), ".so")
        prefix = "" if suffix == ".dll" else "lib"
        libraries = [ctypes.CDLL(str(folder / f"{prefix}{name}{suffix}")) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in SIGNATURES.items():
            function = next((f for f in (getattr(lib, name, None) for lib in libraries) if f is not None), None)
            if function is None:
                raise AttributeError(f"{folder} has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.silent = LogCallback(lambda level, text, user: None)  # else a line on stderr for each weight
        self.ggml_log_set(self.silent, None)
        self.backend = self.ggml_backend_cpu_init()
        registry = self.ggml_backend_cpu_reg()
        self.device = self.ggml_backend_reg_dev_get(registry, 0)
        self.plain = self.ggml_backend_cpu_buffer_type()
        self.extra = []
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
            i = 0
            while found and found[i]:
                self.extra.append(found[i])
                i += 1

    def __getattr__(self, name: str) -> Any:  # the functions are set one by one
        raise AttributeError(name)

    def context(self) -> int:
        """A context for four tensors and a graph; their data lie in buffers."""
        size = 4 * self.ggml_tensor_overhead() + self.ggml_graph_overhead() + 1024
        return int(self.ggml_init(_InitParams(size, None, True)))

    def quantize(self, kind: int, rows: Tensor) -> Tensor:
        """uint8 [rows, bytes]: float32 [rows, in] coded, all columns alike important."""
        count, n = rows.shape
        coded = torch.empty(count, self.ggml_row_size(kind, n), dtype=torch.uint8)
        importance = torch.ones(n)
        pointers = [ctypes.cast(t.data_ptr(), POINTER(c_float)) for t in (rows, importance)]
        self.ggml_quantize_chunk(kind, pointers[0], coded.data_ptr(), 0, count, n, pointers[1])
        return coded


class _Weight:
    """One copy of W in a buffer of its own, and a graph for each count of tokens."""

    def __init__(self, ggml: Ggml, kind: int, source: Source, coded: Tensor, buffer_type: int) -> None:
        """ValueError where that buffer type does not take the weight."""
        self.ggml, self.shape = ggml, source.shape
        self.held: list[tuple[int, int]] = []
        self.graphs: dict[int, tuple[int, Tensor, Tensor]] = {}
        out, n = source.shape
        context = ggml.context()
        self.weight = ggml.ggml_new_tensor_2d(context, kind, n, out)
        self._allocate(context, buffer_type)
        if buffer_type != ggml.plain and not self._supported():
            raise ValueError("no such layout")
        data = source.repeat(coded)
        ggml.ggml_backend_tensor_set(self.weight, data.data_ptr(), 0, data.numel())

    def __call__(self, x: Tensor) -> Tensor:
        """y [tokens, out], which the next call overwrites."""
        found = self.graphs.get(x.shape[0])
        if found is None or found[1] is not x:
            found = self._graph(x)
        graph, _, y = found
        self.ggml.ggml_backend_graph_compute(self.ggml.backend, graph)
        return y

    def __del__(self) -> None:
        for context, buffer in self.held:
            self.ggml.ggml_backend_buffer_free(buffer)
            self.ggml.ggml_free(context)

    def _allocate(self, context: int, buffer_type: int) -> None:
        buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError("ggml could not allocate a buffer")
        self.held.append((context, buffer))

    def _supported(self) -> bool:
        ggml, context = self.ggml, self.ggml.context()
        x = ggml.ggml_new_tensor_2d(context, F32, self.shape[1], 1)
        supported = bool(ggml.ggml_backend_dev_supports_op(ggml.device, ggml.ggml_mul_mat(context, self.weight, x)))
        ggml.ggml_free(context)
        return supported

    def _graph(self, x: Tensor) -> tuple[int, Tensor, Tensor]:
        ggml, (out, n), tokens = self.ggml, self.shape, x.shape[0]
        context = ggml.context()
        given = ggml.ggml_new_tensor_2d(context, F32, n, tokens)
        product = ggml.ggml_mul_mat(context, self.weight, given)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, product)
        self._allocate(context, ggml.plain)
        ggml.ggml_backend_tensor_set(given, x.data_ptr(), 0, 4 * x.numel())
        floats = ctypes.cast(ggml.ggml_get_data(product), POINTER(c_float))
        y = torch.from_numpy(np.ctypeslib.as_array(floats, (tokens, out)))
        self.graphs[tokens] = (graph, x, y)
        return self.graphs[tokens]


def contenders(source: Source, threads: int) -> Iterator[Contender | Absent]:
    ggml = _load()
    if isinstance(ggml, Absent):
        yield ggml
        return
    ggml.ggml_backend_cpu_set_n_threads(ggml.backend, threads)
    for name, kind in TYPES.items():
        block = ggml.ggml_blck_size(kind)
        if source.shape[1] % block:
            yield Absent("ggml", name, f"codes {block} columns together; the weight has {source.shape[1]}")
            continue
        coded = ggml.quantize(kind, source.rows)
        for buffer_type in (ggml.plain, *ggml.extra):
            label = name if buffer_type == ggml.plain else f"{name}, {_name(ggml, buffer_type)}"
            make = _maker(ggml, kind, source, coded, buffer_type)
            try:
                first = make()
            except ValueError:
                continue  # the plain layout always is there
            yield Contender(
                kernel="ggml",
                scheme=label,
                isa="",
                dtype="float32",
                shape=source.shape,
                nbytes=source.shape[0] * coded.shape[1],
                first=first,
                new_copy=make,
                to_input=lambda x: x.contiguous(),
                expected=source.expected(),
            )


def _maker(ggml: Ggml, kind: int, source: Source, coded: Tensor, buffer_type: int) -> Callable[[], Call]:
    return lambda: _Weight(ggml, kind, source, coded, buffer_type)


def _name(ggml: Ggml, buffer_type: int) -> str:
    """ "CPU_REPACK" -> "repack"."""
    return str(ggml.ggml_backend_buft_name(buffer_type).decode()).removeprefix("CPU_").lower()


@cache
def _load() -> Ggml | Absent:
    spec = importlib.util.find_spec("llama_cpp")  # not imported: that would load libllama as well
    if spec is None or spec.origin is None:
        return Absent("ggml", "", f"llama-cpp-python is not installed: {HOW}")
    try:
        return Ggml(Path(spec.origin).parent / "lib")
    except (OSError, AttributeError) as error:
        return Absent("ggml", "", str(error))
