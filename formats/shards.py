"""Writing safetensors shards whose sizes are known before the first weight is.

`plan_shards` decides from names, shapes and dtypes alone which tensor lies at which byte of which file; `ShardWriter`
reserves the space, then fills it in any order, so that an interrupted run goes on where it stopped and the result does
not depend on where that was.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .atomic import PARTIAL, sync_directory, write_atomically
from .errors import FormatError
from .safetensors_file import DTYPE_NAMES

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes: absolute byte `offset` in shard number `shard`."""

    shard: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name, the bytes of its header (length included), its whole size in bytes."""

    file_name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """All files, exactly. index: bytes of `model.safetensors.index.json`, None for a single shard."""

    shards: tuple[Shard, ...]
    slots: dict[str, Slot]
    index: bytes | None

    @property
    def files(self) -> dict[str, int]:
        """{file name: size in bytes}, the index among them."""
        sizes = {shard.file_name: shard.size for shard in self.shards}
        return sizes if self.index is None else sizes | {INDEX_NAME: len(self.index)}

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def plan_shards(
    entries: Sequence[tuple[str, Sequence[int], torch.dtype]], max_shard_bytes: int = 5_000_000_000
) -> ShardPlan:
    """Assign tensors (name, shape, dtype) to shards in the order given; a tensor above the limit has its own shard.

    The limit counts tensor bytes, without the header, as transformers does. Inside a shard, wider dtypes come first
    (the order given, within a dtype's width): then every tensor is aligned to its own item size, without holes.
    FormatError for a duplicate name, a dtype that safetensors lacks, no tensors, or a limit below 1.
    """
    if max_shard_bytes < 1:
        raise FormatError(f"the largest shard size is {max_shard_bytes} bytes; give at least 1")
    groups: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    filled, names, total = 0, set(), 0
    for name, shape, dtype in entries:
        if name in names:
            raise FormatError(f"tensor {name!r} is planned twice")
        if dtype not in DTYPE_NAMES:
            raise FormatError(f"tensor {name!r}: safetensors has no {dtype}; convert it first")
        names.add(name)
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, tuple(int(n) for n in shape), dtype))
        filled += nbytes
        total += nbytes
    if not names:
        raise FormatError("there is no tensor to write")
    shards, slots, weight_map = [], {}, {}
    for number, group in enumerate(groups):
        single = len(groups) == 1
        file_name = "model.safetensors" if single else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda entry: -entry[2].itemsize)  # stable
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at, begins = 0, []
        for name, shape, dtype in group:
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            begins.append(at)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        prefix = len(text).to_bytes(8, "little") + text
        shards.append(Shard(file_name, prefix, len(prefix) + at))
        for begin, (name, shape, dtype) in zip(begins, group, strict=True):
            slots[name] = Slot(number, len(prefix) + begin, shape, dtype)
            weight_map[name] = file_name
    index = None
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return ShardPlan(tuple(shards), {name: slots[name] for name, _, _ in entries}, index)


class ShardWriter:
    """Fills the files of a plan as `<name>.partial` and renames them in `finish`.

    A `.partial` file exists only in full size with its header written (it is reserved under another name and renamed),
    so whatever a kill leaves can be resumed: `ShardWriter(directory, plan, resume=True, written=names)`, where `names`
    are the tensors that the caller's journal says are written. Files that are missing then are made anew and their
    tensors count as not written: `missing` lists what is still to do, and `finish` refuses while there is any.

    Raises FormatError for a full disk (found here, before any work; nothing is left behind) and for partial files of
    another plan.
    """

    def __init__(
        self, directory: str | os.PathLike[str], plan: ShardPlan, *, resume: bool = False, written: Iterable[str] = ()
    ) -> None:
        self.directory = Path(directory)
        self.plan = plan
        self._missing = dict.fromkeys(plan.slots)
        self._handles: list[int] = []
        self._made: list[Path] = []
        self._made_directories: list[Path] = []
        try:
            self._make_directory()
            fresh = {number for number in range(len(plan.shards)) if self._open(number, resume)}
        except (OSError, FormatError) as error:
            self._undo()
            if not isinstance(error, OSError):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            way_out = "free space or choose another directory" if full else "check the directory and its permissions"
            raise FormatError(
                f"{self.directory}: cannot reserve {plan.total_bytes} bytes for the output: {error.strerror}; {way_out}"
            ) from error
        except BaseException:
            self._undo()
            raise
        if resume:
            for name in written:
                if name in plan.slots and plan.slots[name].shard not in fresh:
                    self._missing.pop(name, None)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors not written yet, in the plan's order."""
        return list(self._missing)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. ValueError where shape or dtype are not as planned. Threads may write at once."""
        slot = self.plan.slots.get(name)
        if slot is None:
            raise ValueError(f"tensor {name!r} is not in the plan")
        if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, planned {slot.dtype} {list(slot.shape)}"
            )
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._handles[slot.shard], view[done:], slot.offset + done)
        except OSError as error:
            raise FormatError(f"{self.directory}: writing {name!r} failed: {error.strerror}") from error
        self._missing.pop(name, None)

    def read(self, name: str) -> Tensor:
        """A tensor as written. RuntimeError where it has not been."""
        if name in self._missing:
            raise RuntimeError(f"tensor {name!r} is not written yet")
        slot = self.plan.slots[name]
        flat = torch.empty(slot.nbytes, dtype=torch.uint8)
        view, done = flat.numpy().data, 0
        while done < len(view):
            n = os.preadv(self._handles[slot.shard], [view[done:]], slot.offset + done)
            if n == 0:
                raise FormatError(f"{self.directory}: truncated while reading {name!r}; it was changed during the run")
            done += n
        return flat.view(slot.dtype).view(slot.shape)

    def sync(self) -> None:
        """Flush what is written to disk; call before recording it in a journal that must survive a power cut."""
        for handle in self._handles:
            os.fsync(handle)

    def finish(self) -> None:
        """Flush, give every file its final name, write the index. RuntimeError while tensors are missing."""
        if self._missing:
            raise RuntimeError(
                f"{len(self._missing)} tensors are not written, the first is {next(iter(self._missing))!r}; on resume "
                "pass those written before as `written`"
            )
        try:
            self.sync()
            self.close()
            for shard in self.plan.shards:
                partial = self._partial(shard)
                if partial.exists():  # not, where a kill came between the renames
                    os.replace(partial, self.directory / shard.file_name)
            sync_directory(self.directory)
        except OSError as error:
            raise FormatError(f"{self.directory}: finishing failed: {error.strerror}; run again to go on") from error
        if self.plan.index is not None:
            write_atomically(self.directory / INDEX_NAME, self.plan.index)

    def close(self) -> None:
        """Close the files and leave the partials for a later resume."""
        while self._handles:
            os.close(self._handles.pop())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _partial(self, shard: Shard) -> Path:
        return self.directory / (shard.file_name + PARTIAL)

    def _make_directory(self) -> None:
        path = self.directory.absolute()
        while not path.exists():
            self._made_directories.append(path)
            path = path.parent
        self.directory.mkdir(parents=True, exist_ok=True)

    def _open(self, number: int, resume: bool) -> bool:
        """Open shard `number`; True where it was made anew."""
        shard = self.plan.shards[number]
        partial = self._partial(shard)
        if resume:
            for path in (partial, self.directory / shard.file_name):
                if path.exists():
                    self._handles.append(self._reopen(path, shard))
                    return False
        reserved = partial.with_name(partial.name + ".reserving")
        handle = os.open(reserved, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._handles.append(handle)
        self._made.append(reserved)
        os.posix_fallocate(handle, 0, shard.size)
        os.pwrite(handle, shard.header, 0)
        os.replace(reserved, partial)
        self._made[-1] = partial
        return True

    def _reopen(self, path: Path, shard: Shard) -> int:
        handle = os.open(path, os.O_RDWR)
        if os.fstat(handle).st_size != shard.size or os.pread(handle, len(shard.header), 0) != shard.header:
            os.close(handle)
            raise FormatError(
                f"{path}: belongs to another run (its header is not the one planned now); delete it or repeat the "
                "command it came from"
            )
        return handle

    def _undo(self) -> None:
        self.close()
        for path in self._made:
            path.unlink(missing_ok=True)
        for path in self._made_directories:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
