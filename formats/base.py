"""What every checkpoint format offers, and how the format of a path is found.

A format is a module of this folder with a `FORMAT`; it is found by its name. `open_source(path_or_hub_id)` asks each
whether the path is its own and returns the opened `Source`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .errors import FormatError
from .safetensors_file import TensorInfo


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint. Headers are read and checked; weights are read one at a time, on demand."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json, as transformers understands it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """{name: TensorInfo} under the names that transformers' files use."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""

    def read(self, name: str) -> Tensor:
        """One tensor in fresh CPU memory. KeyError for an unknown name, FormatError for a file that changed."""

    def write_sidecar(self, directory: Path) -> list[str]:
        """Put tokenizer, generation config, chat template and the like into `directory`; names relative to it."""

    def sidecar_bytes(self) -> int:
        """What `write_sidecar` will write, in bytes."""

    def fingerprint(self) -> str:
        """Hex sha256 of the config and of each weight file's size, header, first and last 64 KiB."""


class Format(Protocol):
    name: str

    def sniff(self, path: str) -> bool:
        """Whether `path` (or hub id) is for this format to open, or to explain why not. Cheap, never raises."""

    def open(self, path: str) -> Source:
        """Open it. FormatError in one line where it is not what it should be."""


@cache
def formats() -> dict[str, Format]:
    """{name: format} of every module in this folder that sets `FORMAT`."""
    package = __name__.rpartition(".")[0]
    found = {}
    for info in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda i: i.name):
        entry = getattr(importlib.import_module(f"{package}.{info.name}"), "FORMAT", None)
        if entry is not None:
            found[entry.name] = entry
    return found


def open_source(path_or_hub_id: str | os.PathLike[str]) -> Source:
    """Open a model directory, a .gguf file or a hub id, whichever it is. FormatError where it is none of them."""
    path = os.path.expanduser(os.fspath(path_or_hub_id))
    for entry in formats().values():
        if entry.sniff(path):
            return entry.open(path)
    if os.path.isfile(path):
        raise FormatError(f"{path}: this file is no checkpoint; give a model directory, a .gguf file or a hub id")
    raise FormatError(f"no such model: {path!r}; give a model directory, a .gguf file or a hub id such as org/name")
