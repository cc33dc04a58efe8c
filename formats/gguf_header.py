"""The header of a GGUF file, walked within bounds before any library trusts it.

    "GGUF"  version u32  tensor_count u64  kv_count u64
    kv_count x      key string, value type u32, value
    tensor_count x  name string, n_dims u32, dims u64[n_dims] (innermost first), type u32, offset u64
    padding to `general.alignment`, then the data; offsets count from there

A string is a u64 length and UTF-8 bytes; an array is an element type u32, a u64 count and the elements. Source: the
GGUF description of the ggml repository. Every length and count is held against the bytes that are left in the file, so
a corrupt one costs neither memory nor time.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""GGUF value type -> struct format; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
KEPT_ARRAY = 1024
"""Arrays up to this many numbers are kept (per-layer settings); of longer ones and of strings, only the count."""
MAX_DIMS = 4
"""GGML_MAX_DIMS."""


@dataclass(frozen=True)
class GgufTensor:
    """shape: as numpy and torch have it (outermost first); offset: absolute, in bytes; qtype: ggml type number."""

    name: str
    shape: tuple[int, ...]
    qtype: int
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufHeader:
    """metadata: scalars, strings and short arrays by key; data_start: first byte of the data section.

    long_arrays: keys of arrays of which metadata has only the count.
    """

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int
    long_arrays: frozenset[str]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> GgufHeader:
    """Walk and check the header. FormatError in one line for anything that is not as described above."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _Walk(path, file, size).header()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


class _Walk:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0
        self.long_arrays: set[str] = set()

    def header(self) -> GgufHeader:
        if self.size < 24 or self.file.read(4) != MAGIC:
            raise FormatError(f"{self.path}: not a GGUF file (its first bytes are not 'GGUF')")
        self.at = 4
        version = self.number("<I", "version")
        if version not in VERSIONS:
            what = "big-endian" if version & 0xFFFF == 0 and version else f"version {version}"
            raise FormatError(f"{self.path}: GGUF {what} is not supported, only versions 2 and 3, little-endian")
        tensor_count, kv_count = self.number("<Q", "tensor count"), self.number("<Q", "metadata count")
        self.fits(kv_count, 13, "metadata entries")  # a key of no bytes, a type, one byte of value
        metadata: dict[str, Any] = {}
        for number in range(kv_count):
            key = self.string(f"metadata key {number}")
            if key in metadata:
                raise self.bad(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.number("<I", f"type of {key!r}"), key)
        if not isinstance(metadata.get("general.architecture"), str):
            raise self.bad("metadata has no general.architecture")
        self.fits(tensor_count, 32, "tensors")  # a name of no bytes, one dimension, type, offset
        described = [self.tensor(number) for number in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.bad(f"general.alignment is {alignment!r}, not a power of two")
        data_start = -(-self.at // alignment) * alignment
        tensors = self.placed(described, data_start, alignment)
        return GgufHeader(self.path, self.size, metadata, tensors, data_start, frozenset(self.long_arrays))

    def tensor(self, number: int) -> GgufTensor:
        """One entry, its offset still relative to the data section."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string(f"name of tensor {number}")
        n_dims = self.number("<I", f"dimensions of {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.bad(f"tensor {name!r} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
        dims = [self.number("<Q", f"shape of {name!r}") for _ in range(n_dims)]
        qtype, offset = self.number("<I", f"type of {name!r}"), self.number("<Q", f"offset of {name!r}")
        if min(dims) < 1 or math.prod(dims) >= 2**62:
            raise self.bad(f"tensor {name!r}: shape {dims[::-1]} makes no sense")
        if qtype not in [t.value for t in GGML_QUANT_SIZES]:
            raise self.bad(f"tensor {name!r}: unknown type {qtype}; a newer gguf package may know it")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(qtype)]
        if dims[0] % block:
            raise self.bad(f"tensor {name!r}: rows of {dims[0]} are no multiple of its type's blocks of {block}")
        return GgufTensor(name, tuple(reversed(dims)), qtype, offset, math.prod(dims) // block * block_bytes)

    def placed(self, described: list[GgufTensor], data_start: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        end, previous = data_start, ""
        for t in sorted(described, key=lambda t: t.offset):
            begin = data_start + t.offset
            if t.name in tensors:
                raise self.bad(f"tensor {t.name!r} appears twice")
            if t.offset % alignment:
                raise self.bad(f"tensor {t.name!r}: offset {t.offset} is not a multiple of the alignment {alignment}")
            if begin < end:
                raise self.bad(f"tensor {t.name!r} overlaps {previous!r}")
            end, previous = begin + t.nbytes, t.name
            if end > self.size:
                raise self.bad(f"truncated, or a false offset: tensor {t.name!r} ends at byte {end} of {self.size}")
            tensors[t.name] = GgufTensor(t.name, t.shape, t.qtype, begin, t.nbytes)
        if not tensors:
            raise self.bad("it has no tensors")
        return tensors

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], f"value of {key!r}")
        if kind == STRING:
            return self.string(f"value of {key!r}")
        if kind != ARRAY:
            raise self.bad(f"metadata {key!r} has the unknown type {kind}")
        element, count = self.number("<I", f"array {key!r}"), self.number("<Q", f"array {key!r}")
        if element == STRING:
            self.long_arrays.add(key)
            self.fits(count, 8, f"elements of {key!r}")
            for _ in range(count):
                self.skip(self.number("<Q", f"array {key!r}"), f"array {key!r}")
            return count
        if element not in SCALARS:
            raise self.bad(f"metadata {key!r} is an array of the unsupported type {element}")
        width = struct.calcsize(SCALARS[element])
        self.fits(count, width, f"elements of {key!r}")
        if count > KEPT_ARRAY:
            self.long_arrays.add(key)
            self.skip(count * width, f"array {key!r}")
            return count
        return [self.number(SCALARS[element], f"array {key!r}") for _ in range(count)]

    def number(self, form: str, what: str) -> Any:
        width = struct.calcsize(form)
        raw = self.file.read(width)
        if len(raw) != width:
            raise self.bad(f"truncated in its header ({what})")
        self.at += width
        return struct.unpack(form, raw)[0]

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        self.fits(length, 1, f"bytes of the {what}")
        self.at += length
        try:
            return self.file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def skip(self, length: int, what: str) -> None:
        self.fits(length, 1, f"bytes of the {what}")
        self.at += length
        # reading keeps the buffer, seeking would drop it: 50 times faster over a vocabulary of short strings
        if length < 4096:
            self.file.read(length)
        else:
            self.file.seek(self.at)

    def fits(self, count: int, width: int, what: str) -> None:
        left = self.size - self.at
        if count * width > left:
            raise self.bad(f"claims {count} {what}, only {left} bytes are left in the file")

    def bad(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: corrupt GGUF file: {what}; fetch it again")
