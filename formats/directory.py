"""A transformers directory: config.json beside one `model.safetensors`, or shards and their index."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from .config_json import quant_method, read_json
from .errors import FormatError
from .safetensors_file import SafetensorsFile, TensorInfo, file_fingerprint
from .shards import INDEX_NAME
from .sidecar import copy_sidecar, sidecar_size

OURS: Final = "bitpalette"
"""quantization_config.quant_method of the native format (`native.py`)."""


class DirectorySource:
    """Config and safetensors of a directory, whatever the config says about quantization."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise FormatError(_no_checkpoint(self.path, "it has no config.json"))
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.files: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        index_path = self.path / INDEX_NAME
        # the order transformers looks in: a single file wins over an index beside it
        if (self.path / "model.safetensors").is_file():
            self._add("model.safetensors")
        elif index_path.is_file():
            self._add_shards(index_path)
        else:
            raise FormatError(_no_checkpoint(self.path, "it has no model.safetensors and no index of shards"))

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def read(self, name: str) -> Tensor:
        return self.files[self.tensors[name].file.name].read(name)

    def write_sidecar(self, directory: Path) -> list[str]:
        return copy_sidecar(self.path, Path(directory))

    def sidecar_bytes(self) -> int:
        return sidecar_size(self.path)

    def fingerprint(self) -> str:
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.files.values(), key=lambda f: f.path.name):
            digest.update(file_fingerprint(file.path, file.header).encode())
        return digest.hexdigest()

    def _add(self, file_name: str) -> None:
        file = SafetensorsFile(self.path / file_name)
        for name, info in file.tensors.items():
            other = self.tensors.get(name)
            if other is not None:
                raise FormatError(
                    f"{self.path}: tensor {name!r} is in both {other.file.name} and {file_name}; delete the shard that "
                    "does not belong"
                )
            self.tensors[name] = info
        self.files[file_name] = file

    def _add_shards(self, index_path: Path) -> None:
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index_path}: has no weight_map; fetch or write it again")
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or os.path.basename(file_name) != file_name or not file_name:
                raise FormatError(
                    f"{index_path}: tensor {name!r} is said to be in {file_name!r}, which is no file name"
                )
        for file_name in sorted(set(weight_map.values())):
            if not (self.path / file_name).is_file():
                raise FormatError(f"{index_path}: names the shard {file_name!r}, which is missing; fetch it again")
            self._add(file_name)
        for name, file_name in weight_map.items():
            if name not in self.files[file_name].tensors:
                raise FormatError(f"{index_path}: tensor {name!r} is not in {file_name}; index and shards do not match")


class DirectoryFormat:
    name = "directory"

    def sniff(self, path: str) -> bool:
        return os.path.isdir(path) and not is_native(path)

    def open(self, path: str) -> DirectorySource:
        config_path = Path(path) / "config.json"
        if config_path.is_file() and (method := quant_method(read_json(config_path))):
            raise FormatError(f"{path}: already quantized with {method!r}; give the unquantized checkpoint")
        return DirectorySource(path)


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether a directory's config.json names our own quant_method."""
    try:
        return quant_method(read_json(Path(path) / "config.json")) == OURS
    except FormatError:
        return False


def _no_checkpoint(path: Path, why: str) -> str:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return f"{path}: holds pytorch_model.bin only; convert it to safetensors (transformers: load, save_pretrained)"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{path}: {why}; it holds {gguf[0]!r}, give the path of that file"
    return f"{path}: no checkpoint, {why}; give a transformers directory with safetensors"


FORMAT = DirectoryFormat()
