"""A .gguf file as a source of bf16 tensors under transformers' names.

The header is checked by `gguf_header.py`; what the metadata means (config, tensor names, undoing llama.cpp's changes
to weights such as the q/k permutation, tokenizer) is transformers' own knowledge and used from there, through
`gguf_mapping.py`; blocks are decoded by the gguf package. Tensors are read and decoded one at a time.

transformers is imported inside functions: it takes seconds, and most commands on other formats do not need it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .atomic import write_atomically
from .errors import FormatError
from .gguf_blocks import decode_rows
from .gguf_header import MAGIC, GgufHeader, read_header
from .gguf_mapping import map_header
from .safetensors_file import TensorInfo, file_fingerprint, read_exactly

UNCHANGED = ("token_embd.weight", "output.weight")
"""No architecture's conversion changes these, the largest tensors; they are decoded some rows at a time."""

CHUNK_WEIGHTS = 4 << 20
"""Weights decoded at once: float32 and the decoder's temporaries stay near 100 MB."""


class GgufSource:
    """An opened .gguf file: the `Source` of `base.py`. Every tensor is bf16, as `config["dtype"]` says."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        _check_metadata(self.header)
        with _trouble(self.path, f"the metadata of architecture {self.header.architecture!r} cannot be mapped"):
            self._mapping = map_header(self.header)
        self.config: dict[str, Any] = self._mapping.config
        self.tensors = {
            name: TensorInfo(name, shape, torch.bfloat16, sum(t.nbytes for t in self._mapping.parts[name]), self.path)
            for name, shape in self._mapping.shapes.items()
        }

    @property
    def size_bytes(self) -> int:
        return self.header.size

    def read(self, name: str) -> Tensor:
        info, parts = self.tensors[name], self._mapping.parts[name]
        if len(parts) == 1 and parts[0].name in UNCHANGED:
            out = torch.empty(info.shape, dtype=torch.bfloat16)
            step = max(1, CHUNK_WEIGHTS // info.shape[-1])
            for first in range(0, info.shape[0], step):
                last = min(first + step, info.shape[0])
                out[first:last] = torch.from_numpy(decode_rows(self.path, parts[0], first, last))
            return out
        gathered: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in parts:  # several: the experts' gate and up projections, which transformers keeps as one
            result = self._mapping.processor.process(
                weights=decode_rows(self.path, part, 0, math.prod(part.shape[:-1])).reshape(part.shape),
                name=part.name,
                tensor_key_mapping=self._mapping.key_mapping,
                parsed_parameters=gathered,
            )
            if result.name is not None:
                gathered["tensors"][name] = torch.from_numpy(np.ascontiguousarray(result.weights))
        (value,) = gathered["tensors"].values()
        if tuple(value.shape) != info.shape:
            raise FormatError(
                f"{self.path}: tensor {name!r} has shape {list(value.shape)}, its metadata needs {list(info.shape)}"
            )
        return value.to(torch.bfloat16)

    def write_sidecar(self, directory: Path) -> list[str]:
        for name, content in self._sidecar.items():
            target = Path(directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)
        return list(self._sidecar)

    def sidecar_bytes(self) -> int:
        return sum(len(content) for content in self._sidecar.values())

    def fingerprint(self) -> str:
        raw = torch.empty(self.header.data_start, dtype=torch.uint8)
        read_exactly(self.path, 0, raw, "header")
        content = file_fingerprint(self.path, raw.numpy().tobytes())
        return hashlib.sha256((json.dumps(self.config, sort_keys=True) + content).encode()).hexdigest()

    @cached_property
    def _sidecar(self) -> dict[str, bytes]:
        """{relative path: content}: tokenizer and chat template as transformers saves them, generation config."""
        files: dict[str, bytes] = {}
        if "tokenizer.ggml.model" in self.header.metadata:
            with _trouble(self.path, "its tokenizer cannot be converted"):
                files = _tokenizer_files(self.path)
        text = json.dumps(_generation_config(self.header.metadata), indent=2, sort_keys=True) + "\n"
        return dict(sorted((files | {"generation_config.json": text.encode()}).items()))


class GgufFormat:
    name = "gguf"

    def sniff(self, path: str) -> bool:
        if not os.path.isfile(path):
            return False
        try:
            with open(path, "rb") as file:
                return path.endswith(".gguf") or file.read(4) == MAGIC
        except OSError:
            return path.endswith(".gguf")

    def open(self, path: str) -> GgufSource:
        return GgufSource(path)


@contextmanager
def _trouble(path: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises on metadata that it does not expect becomes one line."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:  # KeyError, ValueError, ZeroDivisionError, ...: its readers check nothing
        raise FormatError(f"{path}: {what}: {type(error).__name__}: {error}; use another file") from error


def _check_metadata(header: GgufHeader) -> None:
    """What must hold before transformers builds anything of a size that the metadata claims."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    arch, metadata, path = header.architecture, header.metadata, header.path
    if metadata.get("split.count", 0) not in (0, 1):
        raise FormatError(f"{path}: one part of {metadata['split.count']}; merge them first (llama-gguf-split --merge)")
    blocks = metadata.get(f"{arch}.block_count")
    there = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.") and name.count(".") > 1})
    if not isinstance(blocks, int) or not 0 < blocks <= there:
        raise FormatError(f"{path}: {arch}.block_count is {blocks!r}, the file has {there} blocks; use another file")
    for key in ("expert_count", "attention.head_count", "attention.head_count_kv"):
        value = metadata.get(f"{arch}.{key}", 0)
        if isinstance(value, int) and not 0 <= value <= 1 << 16:
            raise FormatError(f"{path}: {arch}.{key} is {value}, which makes no sense; use another file")
    for qtype in sorted({tensor.qtype for tensor in header.tensors.values()}):
        kind = GGMLQuantizationType(qtype)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise FormatError(f"{path}: tensors of type {kind.name} cannot be decoded; use another file") from error


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.init_kwargs.pop("name_or_path", None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        root = Path(folder)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Special ids; every token that ends a turn or message ends generation."""
    out: dict[str, Any] = {}
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    if ids["bos"] is not None:
        out["bos_token_id"] = ids["bos"]
    if ends:
        out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if ids["padding"] is not None:
        out["pad_token_id"] = ids["padding"]
    return out


FORMAT = GgufFormat()
