"""Reading one safetensors file, distrusting its header.

    byte 0..7        header length N, little-endian uint64
    byte 8..8+N-1    JSON: {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    byte 8+N..       the data; the tensors' ranges, sorted, cover it without overlap or hole

Source: the safetensors format description of its repository. A tensor is read with `pread` into fresh memory, never
by mapping the file: mapped pages count as resident memory, and a checkpoint is meant to pass through tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from .errors import FormatError

MAX_HEADER = 100_000_000
"""Longest header the safetensors library itself accepts, in bytes."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. nbytes: what it takes in `file`, which for GGUF is fewer than its dtype would."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: Path


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Count]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


class SafetensorsFile:
    """One validated file: `.tensors`, `.metadata`, `.read(name)`.

    Raises FormatError, naming the file and where possible the tensor, for every way a header can lie: truncation, a
    length beyond the file, invalid JSON, duplicate names, unknown dtypes, negative or overflowing shapes, ranges that
    are inverted, overlap, leave holes, leave the file or disagree with dtype x shape.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or length > min(self.size - 8, MAX_HEADER):
                    raise FormatError(
                        f"{self.path}: not a safetensors file or truncated: the header claims {length} bytes, the file "
                        f"has {self.size}; fetch it again"
                    )
                self.header = prefix + file.read(length)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from error
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        self._parse()

    def read(self, name: str) -> Tensor:
        """The tensor, in fresh memory on the CPU. KeyError for a name that `.tensors` does not have."""
        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        read_exactly(self.path, self._begin[name], raw, name)
        return raw.view(info.dtype).reshape(info.shape)

    def byte_range(self, name: str) -> tuple[int, int]:
        """(first byte, one past the last) of the tensor in the file."""
        return self._begin[name], self._begin[name] + self.tensors[name].nbytes

    def _parse(self) -> None:
        try:
            entries = json.loads(self.header[8:].decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"header is not valid JSON ({error})") from error
        if not isinstance(entries, dict):
            raise self._bad("header is not a JSON object")
        try:
            self.metadata = _METADATA.validate_python(entries.pop("__metadata__", {}))
        except ValidationError as error:
            raise self._bad(f"__metadata__ is not a map of strings ({_first(error)})") from error
        data_start, ranges = len(self.header), []
        for name, values in entries.items():
            info, begin = self._entry(name, values)
            self.tensors[name] = info
            self._begin[name] = data_start + begin
            ranges.append((begin, begin + info.nbytes, name))
        at, previous = 0, ""
        for begin, end, name in sorted(ranges):
            if begin != at:
                what = f"overlaps {previous!r}" if begin < at else "leaves a hole before it"
                raise self._bad(f"tensor {name!r}: range {begin}..{end} {what} (expected to begin at {at})")
            at, previous = end, name
        if data_start + at != self.size:
            what = "truncated" if data_start + at > self.size else "longer than its tensors"
            raise self._bad(f"{what}: tensors end at byte {data_start + at}, the file at {self.size}")

    def _entry(self, name: str, values: Any) -> tuple[TensorInfo, int]:
        try:
            name.encode()  # JSON can spell lone surrogates, which no file or terminal can hold
            entry = _Entry.model_validate(values)
        except UnicodeEncodeError as error:
            raise self._bad(f"tensor {name!r}: the name is not valid Unicode") from error
        except ValidationError as error:
            raise self._bad(f"tensor {name!r}: {_first(error)}") from error
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise self._bad(f"tensor {name!r}: unknown dtype {entry.dtype!r}; known are {', '.join(DTYPES)}")
        begin, end = entry.data_offsets
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if begin > end:
            raise self._bad(f"tensor {name!r}: inverted range {begin}..{end}")
        if end - begin != nbytes:
            raise self._bad(
                f"tensor {name!r}: {entry.dtype} {entry.shape} takes {nbytes} bytes, its range {end - begin}"
            )
        if len(self.header) + end > self.size:
            raise self._bad(f"truncated: tensor {name!r} ends at byte {len(self.header) + end} of {self.size}")
        if math.prod(n for n in entry.shape if n) >= 2**62:  # an empty tensor whose strides would overflow
            raise self._bad(f"tensor {name!r}: shape {entry.shape} overflows")
        return TensorInfo(name, tuple(entry.shape), dtype, nbytes, self.path), begin

    def _bad(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: corrupt safetensors file: {what}; fetch or write it again")


def read_exactly(path: Path, offset: int, into: Tensor, what: str) -> None:
    """Fill `into` (uint8, flat) from byte `offset` of the file. FormatError naming `what` where it ends early."""
    view = into.numpy().data
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                n = os.preadv(handle, [view[done:]], offset + done)
                if n == 0:
                    raise FormatError(f"{path}: truncated while reading {what!r}; it was changed during the run")
                done += n
        finally:
            os.close(handle)
    except OSError as error:
        raise FormatError(f"{path}: reading {what!r} failed: {error.strerror}") from error


SAMPLE = 64 * 1024


def file_fingerprint(path: Path, header: bytes) -> str:
    """sha256 over the file's size, its header and the first and last 64 KiB. Two reads, whatever the size.

    It tells checkpoints apart that a person would call different; it does not detect a flipped bit in the middle of a
    file, which is what the manifest's full hashes are for. Neither name nor modification time enters.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little") + hashlib.sha256(header).digest())
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} appears twice")
    return out


def _first(error: ValidationError) -> str:
    """The first complaint of a pydantic error on one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    shown = repr(first["input"])
    return f"{where or 'value'}: {first['msg']}, got {shown[:60]}"
