"""A file is complete or absent: written beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import FormatError

PARTIAL = ".partial"
"""Suffix of everything unfinished; no reader takes such a file for part of a checkpoint."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`.partial, flush it to disk, rename. FormatError where the system refuses (full disk)."""
    beside = path.with_name(path.name + PARTIAL)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FormatError(f"{path}: cannot write {len(content)} bytes: {error.strerror}; free space or choose another "
                          "output directory") from error  # fmt: skip


def copy_atomically(source: Path, target: Path) -> None:
    """Copy the contents (links are followed) of `source` to `target`. FormatError where the system refuses."""
    beside = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, beside)
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FormatError(
            f"cannot copy {source} to {target}: {error.strerror}; free space or check permissions"
        ) from error


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
