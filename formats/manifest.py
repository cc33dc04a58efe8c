"""The manifest: sha256 and size of every file, written last. Only a directory with one is complete.

For safetensors files it also has a CRC-32 for every tensor, so that `verify` can name the tensor whose bytes changed;
both are computed in one pass over the file.

    {"version": 1, "files": {"model.safetensors": {"size": 123, "sha256": "...", "tensors": {"NAME": "8 hex digits"}}}}
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .atomic import PARTIAL, sync_directory, write_atomically
from .config_json import read_json
from .errors import FormatError
from .safetensors_file import SafetensorsFile

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
CHUNK = 1 << 20


class FileRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    size: Annotated[int, Field(ge=0)]
    sha256: str
    tensors: dict[str, str] | None = None


class Manifest(BaseModel):
    version: int
    files: dict[str, FileRecord]


def write_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Hash every file of the directory (not itself, not hidden ones) and write `manifest.json`, which completes it.

    FormatError where an unfinished `.partial` file is still there, or on a full disk.
    """
    directory = Path(directory)
    records = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST_NAME or any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.suffix == PARTIAL and name != MANIFEST_NAME + PARTIAL:
            raise FormatError(f"{path}: unfinished; finish or delete it before the manifest is written")
        if path.suffix != PARTIAL:
            records[name] = hash_file(path)
    manifest = Manifest(version=MANIFEST_VERSION, files=records)
    rewrite_manifest(directory, manifest)
    return manifest


def rewrite_manifest(directory: Path, manifest: Manifest) -> None:
    """Put `manifest` in the place of the directory's. FormatError on a full disk."""
    text = json.dumps(manifest.model_dump(exclude_none=True), indent=1, sort_keys=True) + "\n"
    write_atomically(directory / MANIFEST_NAME, text.encode())
    sync_directory(directory)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """FormatError where there is none, or where it is not what `write_manifest` writes."""
    path = Path(directory) / MANIFEST_NAME
    values = read_json(path)
    version = values.get("version")
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise FormatError(f"{path}: written by a newer bitpalette (manifest {version}); upgrade bitpalette")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FormatError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write it again") from error
    for name in manifest.files:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise FormatError(f"{path}: names {name!r}, which is outside the directory")
    return manifest


def is_complete(directory: str | os.PathLike[str]) -> bool:
    """Whether there is a manifest and every file it lists is there in its size. Cheap: hashes are `verify`'s part."""
    try:
        manifest = read_manifest(directory)
        return all((Path(directory) / name).stat().st_size == entry.size for name, entry in manifest.files.items())
    except (FormatError, OSError):
        return False


def hash_file(path: Path) -> FileRecord:
    """Size, sha256 and, for a safetensors file, the CRC-32 of each tensor. FormatError where it cannot be read."""
    boundaries: list[tuple[int, int, str]] = []
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        boundaries = sorted((*file.byte_range(name), name) for name in file.tensors)
    digest, crcs, at, current = hashlib.sha256(), {name: 0 for _, _, name in boundaries}, 0, 0
    try:
        with open(path, "rb", buffering=0) as handle:
            while chunk := handle.read(CHUNK):
                digest.update(chunk)
                end = at + len(chunk)
                while current < len(boundaries) and boundaries[current][0] < end:
                    first, last, name = boundaries[current]
                    crcs[name] = zlib.crc32(memoryview(chunk)[max(first - at, 0) : last - at], crcs[name])
                    if last > end:
                        break
                    current += 1
                at = end
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    tensors = {name: f"{crc:08x}" for name, crc in crcs.items()} if path.suffix == ".safetensors" else None
    return FileRecord(size=at, sha256=digest.hexdigest(), tensors=tensors)
