from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from bitpalette.formats.errors import FormatError
from bitpalette.formats.safetensors_file import DTYPES, SafetensorsFile

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}
GOOD = save(TENSORS, metadata={"format": "pt"})


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_every_dtype(tmp_path: Path) -> None:
    names = {n: d for n, d in DTYPES.items() if n != "F8_E8M0"}  # the library's writer lacks it
    tensors = {n: torch.arange(6).reshape(2, 3).to(d) for n, d in names.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "by test"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"made": "by test"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got = file.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        assert file.tensors[name].nbytes == tensor.numel() * tensor.element_size()


def test_reads_scalars_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = SafetensorsFile(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).shape == tensor.shape


BAD = {
    "empty file": (b"", "truncated"),
    "short prefix": (b"\1\2", "truncated"),
    "header beyond the file": ((1000).to_bytes(8, "little") + b"{}", "1000 bytes"),
    "header length overflows": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "no JSON": (with_header(b"{nope"), "JSON"),
    "not UTF-8": (with_header(b"\xff\xfe{}"), "JSON"),
    "deep nesting": (with_header(b"[" * 100_000), "JSON"),
    "a list": (with_header([]), "JSON object"),
    "duplicate": (with_header(b'{"w":1,"w":2}'), "'w' appears twice"),
    "metadata": (with_header({"__metadata__": {"a": 1}, "w": entry()}), "__metadata__"),
    "entry is no object": (with_header({"w": 3}), "'w'"),
    "no offsets": (with_header({"w": {"dtype": "F32", "shape": [2]}}), "'w'"),
    "unknown dtype": (with_header({"w": entry("F31")}), "'w': unknown dtype 'F31'"),
    "dtype and length": (with_header({"w": entry("F64")}), "'w': F64 [2] takes 16 bytes, its range 8"),
    "negative shape": (with_header({"w": entry(shape=[-2])}), "'w'"),
    "shape overflows": (with_header({"w": entry(shape=[2**62, 4])}), "'w'"),
    "shape beyond 64 bits": (with_header({"w": entry(shape=[2**80, 0])}), "'w'"),
    "empty but overflowing": (with_header({"w": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b""), "overflows"),
    "float in shape": (with_header({"w": entry(shape=[2.0])}), "'w'"),
    "inverted": (with_header({"w": entry(offsets=[8, 0])}), "inverted"),
    "beyond the end": (with_header({"w": entry(shape=[4], offsets=[0, 16])}), "'w' ends at"),
    "far beyond": (with_header({"w": entry("U8", [2**61], [0, 2**61])}), "'w' ends at"),
    "overlap": (with_header({"v": entry(), "w": entry(shape=[1], offsets=[4, 8])}), "'w': range 4..8 overlaps 'v'"),
    "hole": (with_header({"w": entry(shape=[1], offsets=[4, 8])}), "hole"),
    "data left over": (with_header({"w": entry()}, b"\0" * 9), "longer than its tensors"),
    "lone surrogate": (with_header(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "Unicode"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_clear_line(tmp_path: Path, case: str) -> None:
    content, says = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        SafetensorsFile(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = SafetensorsFile(path)
    path.write_bytes(GOOD[:-30])
    last = max(file.tensors, key=file.byte_range)
    with pytest.raises(FormatError, match=f"truncated while reading '{last}'"):
        file.read(last)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    keep=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
def test_any_corruption_is_a_format_error_or_reads(tmp_path: Path, flips: list[tuple[int, int]], keep: int) -> None:
    content = bytearray(GOOD)
    for at, value in flips:
        content[at] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content[:keep])
    said = ""
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert tuple(file.read(name).shape) == info.shape
    except FormatError as error:
        said = str(error)
    assert "\n" not in said
