from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bitpalette.formats.errors import FormatError
from bitpalette.formats.safetensors_file import SafetensorsFile
from bitpalette.formats.shards import INDEX_NAME, ShardPlan, ShardWriter, plan_shards

TENSORS: dict[str, Tensor] = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "scale": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).half(),
    "norm": torch.ones(17),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False, True]),
    "fp8": torch.arange(9).to(torch.float8_e4m3fn),
}
ENTRIES = [(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]


def fill(writer: ShardWriter, names: list[str]) -> None:
    for name in names:
        writer.write(name, TENSORS[name])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("limit", [10**9, 60, 1])
def test_plan_is_exact_and_safetensors_reads_it(tmp_path: Path, limit: int) -> None:
    plan = plan_shards(ENTRIES, limit)
    with ShardWriter(tmp_path, plan) as writer:
        fill(writer, list(TENSORS)[::-1])
        writer.finish()
    assert {name: len(content) for name, content in contents(tmp_path).items()} == plan.files
    assert plan.total_bytes == sum(plan.files.values())
    loaded = {}
    for name in plan.files:
        if name != INDEX_NAME:
            loaded |= load_file(tmp_path / name)
            with safe_open(tmp_path / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
            ours = SafetensorsFile(tmp_path / name)
            for tensor_name, info in ours.tensors.items():  # aligned to its own item size
                assert ours.byte_range(tensor_name)[0] % info.dtype.itemsize == 0
                assert len(ours.header) % 8 == 0
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_golden_bytes_of_a_single_shard(tmp_path: Path) -> None:
    plan = plan_shards([("w", (2,), torch.int16)])
    with ShardWriter(tmp_path, plan) as writer:
        writer.write("w", torch.tensor([1, 513], dtype=torch.int16))
        writer.finish()
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + b"\1\0\1\2"
    assert contents(tmp_path) == {"model.safetensors": expected}


def test_sharding_keeps_order_and_isolates_giants() -> None:
    entries = [(name, (size,), torch.uint8) for name, size in [("a", 4), ("b", 4), ("giant", 100), ("c", 8), ("d", 1)]]
    plan = plan_shards(entries, 8)
    assert [plan.slots[name].shard for name in "ab"] == [0, 0]
    assert [plan.slots[name].shard for name in ("giant", "c", "d")] == [1, 2, 3]
    assert [s.file_name for s in plan.shards][:2] == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
    ]
    assert plan.index is not None
    index = json.loads(plan.index)
    assert index["metadata"] == {"total_size": 117}
    assert index["weight_map"]["giant"] == "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("entries", "limit", "says"),
    [
        ([("a", (1,), torch.uint8)] * 2, 10, "planned twice"),
        ([("a", (1,), torch.quint8)], 10, "convert it"),
        ([], 10, "no tensor"),
        ([("a", (1,), torch.uint8)], 0, "at least 1"),
    ],
)
def test_impossible_plans(entries: list[tuple[str, tuple[int, ...], torch.dtype]], limit: int, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        plan_shards(entries, limit)


def test_resume_after_each_tensor_gives_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_shards(ENTRIES, 60)
    names = list(TENSORS)
    with ShardWriter(tmp_path / "whole", plan) as writer:
        fill(writer, names)
        writer.finish()
    for done in range(len(names) + 1):
        directory = tmp_path / str(done)
        with ShardWriter(directory, plan) as writer:
            fill(writer, names[:done])
        with ShardWriter(directory, plan, resume=True, written=names[:done]) as writer:
            assert writer.missing == names[done:]
            fill(writer, writer.missing)
            writer.finish()
        assert contents(directory) == contents(tmp_path / "whole")


def test_resume_between_the_renames_and_after_the_end(tmp_path: Path) -> None:
    plan = plan_shards(ENTRIES, 60)
    with ShardWriter(tmp_path, plan) as writer:
        fill(writer, list(TENSORS))
    first = plan.shards[0].file_name
    os.replace(tmp_path / (first + ".partial"), tmp_path / first)
    for _ in range(2):
        with ShardWriter(tmp_path, plan, resume=True, written=TENSORS) as writer:
            assert writer.missing == []
            writer.finish()
        assert set(contents(tmp_path)) == set(plan.files)


def test_tensors_of_a_lost_partial_count_as_missing(tmp_path: Path) -> None:
    plan = plan_shards(ENTRIES, 60)
    with ShardWriter(tmp_path, plan) as writer:
        fill(writer, list(TENSORS))
    lost = plan.shards[1]
    (tmp_path / (lost.file_name + ".partial")).unlink()
    with ShardWriter(tmp_path, plan, resume=True, written=TENSORS) as writer:
        assert writer.missing == [name for name in TENSORS if plan.slots[name].shard == 1]
        with pytest.raises(RuntimeError, match="not written"):
            writer.finish()


def test_resume_refuses_another_plans_partials(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan_shards(ENTRIES)):
        pass
    before = contents(tmp_path)
    other = plan_shards([("codes", (8,), torch.uint8), *ENTRIES[1:]])
    with pytest.raises(FormatError, match="belongs to another run"):
        ShardWriter(tmp_path, other, resume=True)
    assert contents(tmp_path) == before


def test_write_checks_name_shape_and_dtype(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan_shards(ENTRIES)) as writer:
        for name, tensor in [("nope", torch.ones(1)), ("norm", torch.ones(16)), ("norm", torch.ones(17).double())]:
            with pytest.raises(ValueError, match=name):
                writer.write(name, tensor)


def test_writes_views_that_are_not_contiguous(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    with ShardWriter(tmp_path, plan_shards([("t", (4, 3), torch.float32)])) as writer:
        writer.write("t", base.T)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], base.T)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    plan: ShardPlan = plan_shards(ENTRIES, 60)
    calls = []

    def full(handle: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FormatError, match="No space left on device; free space") as error:
        ShardWriter(tmp_path / "new" / "out", plan)
    assert str(plan.total_bytes) in str(error.value) and len(calls) == fails_at + 1
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="check the directory"):
        ShardWriter(tmp_path / "file" / "out", plan_shards(ENTRIES))
