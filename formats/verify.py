"""Whether a native checkpoint is what was written, and whether every tensor of it decodes to finite numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..quant.scheme import SchemeError
from ..quant.tensor import QuantizedTensor, unstack
from .errors import FormatError
from .manifest import MANIFEST_NAME, FileRecord, hash_file, read_manifest
from .native import NativeSource, stored_name


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. file: relative to the directory; tensor: stored name, None where it is the file's."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.tensor is None else f"{self.file}: {self.tensor}: {self.what}"


def verify(directory: str | os.PathLike[str]) -> Iterator[Problem]:
    """Every problem of a native checkpoint, files first, then tensors; nothing where it is sound. Reads all of it."""
    directory = Path(directory)
    if not directory.is_dir():
        yield Problem(str(directory), None, "no such directory")
        return
    try:
        files = read_manifest(directory).files
    except FormatError as error:
        yield Problem(MANIFEST_NAME, None, f"the checkpoint is incomplete: {error}")
        files = {}
    for name, expected in files.items():
        yield from _verify_file(directory, name, expected)
    try:
        source = NativeSource(directory, allow_incomplete=True)
    except FormatError as error:
        yield Problem("config.json", None, f"cannot be opened: {error}")
        return
    for name in source.tensors:
        yield from _verify_tensor(source, name)


def _verify_file(directory: Path, name: str, expected: FileRecord) -> Iterator[Problem]:
    path = directory / name
    if not path.is_file():
        yield Problem(name, None, "missing")
        return
    try:
        found = hash_file(path)
    except FormatError as error:
        yield Problem(name, None, str(error))
        return
    if found.size != expected.size:
        yield Problem(name, None, f"has {found.size} bytes, {expected.size} were written")
    elif found.sha256 != expected.sha256:
        wrong = [t for t, crc in (expected.tensors or {}).items() if (found.tensors or {}).get(t) != crc]
        if not wrong:
            where = " (outside the tensors: its header)" if expected.tensors else ""
            yield Problem(name, None, f"changed since it was written{where}")
        for tensor in wrong:
            yield Problem(name, tensor, "changed since it was written")


def _verify_tensor(source: NativeSource, name: str) -> Iterator[Problem]:
    file = source.tensors[name].file.name
    try:
        if name not in source.quantization.tensors:
            yield from _finite(file, name, source.read(name), "values")
            return
        qt = source.read_quantized(name)
        for field, tensor in qt.fields.items():
            yield from _finite(file, stored_name(name, field), tensor, "values")
        parts = unstack(qt) if len(qt.shape) == 3 else [qt]  # expert by expert: a stack in float32 may be large
        for number, part in enumerate(parts):
            yield from _decodes(file, name, part, f" (expert {number})" if len(parts) > 1 else "")
    except (FormatError, SchemeError, RuntimeError, ValueError, IndexError) as error:  # whatever a codec meets
        yield Problem(file, name, f"does not decode: {error}")


def _decodes(file: str, name: str, qt: QuantizedTensor, which: str) -> Iterator[Problem]:
    w = qt.dequantize()
    if tuple(w.shape) != qt.shape:
        yield Problem(file, name, f"decodes to shape {list(w.shape)}, not {list(qt.shape)}{which}")
    yield from _finite(file, name, w, f"decoded values{which}")


def _finite(file: str, name: str, tensor: Tensor, what: str) -> Iterator[Problem]:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.to(torch.float32)
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        yield Problem(file, name, f"{bad} of {tensor.numel()} {what} are NaN or infinite")
