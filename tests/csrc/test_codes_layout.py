"""The packed layout of csrc/cpu/codes.h, byte for byte, and what the native calls refuse."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from bitpalette.kernels.code_planes import pack_planes, unpack_planes
from bitpalette.kernels.cpu_int import CpuIntKernel
from bitpalette.quant import native
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.int import IntScheme
from bitpalette.quant.native import NativeError
from bitpalette.quant.tensor import QuantizedTensor

needs_module = pytest.mark.skipif(not native.available_isas(), reason="the CPU extension is not built")


def weight(out: int, n: int, group_size: int, symmetric: bool = False) -> QuantizedTensor:
    row, column = torch.arange(out)[:, None], torch.arange(n)[None, :]
    groups = -(-n // group_size)
    codes = ((row * 7 + column * 3 + column // 16) % 16).to(torch.uint8)
    fields = {
        "codes": pack_bits(codes, 4).flatten(),
        "scale": ((torch.arange(out * groups) + 1) / 64).half().view(out, groups),
    }
    if not symmetric:
        fields["zero_point"] = pack_bits(((row + torch.arange(groups)) % 16).to(torch.uint8), 4)
    return QuantizedTensor(IntScheme(bits=4, group_size=group_size, symmetric=symmetric), (out, n), fields)


def test_golden_bytes() -> None:
    packed = CpuIntKernel().prepare(weight(19, 70, 32)).tensors
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == {
        "codes": ((2, 3, 4, 16, 4), torch.uint8),
        "scale": ((2, 3, 16), torch.float16),
        "zero_point": ((2, 3, 16), torch.uint8),
    }
    # row 0 holds 0 3 6 9 12 15 2 5 | 8 ...: byte i is column i below column 4 + i
    assert packed["codes"][0, 0, 0, 0].tolist() == [0xC0, 0xF3, 0x26, 0x59]
    assert packed["codes"][0, 0, 0, 1].tolist() == [0x37, 0x6A, 0x9D, 0xC0]
    assert packed["codes"][1, 0, 0, 3:].count_nonzero() == 0  # rows 19..31 do not exist
    assert packed["codes"][0, 2, 1:].count_nonzero() == 0  # nor do columns 72..95
    assert packed["scale"][1, 2, :4].tolist() == [(3 * 16 + 3) / 64, (3 * 17 + 3) / 64, (3 * 18 + 3) / 64, 0]
    assert packed["zero_point"][0, 1].tolist() == [(r + 1) % 16 for r in range(16)]
    digest = hashlib.sha256()
    for name in ("codes", "scale", "zero_point"):
        digest.update(packed[name].contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == "e782be4eba79a32e"


@pytest.mark.parametrize(
    ("bits", "digest"),
    [
        (1, "cdd5c53d2e487cbc"),
        (2, "ca4d3953b7a0a186"),
        (3, "ff84c4316270c923"),
        (5, "67cfe69b7c91e6c4"),
        (6, "5753356f47ad23fc"),
        (7, "44891b5907a1eaa9"),
        (8, "ee14a6d7821d6c0f"),
    ],
)
def test_golden_planes(bits: int, digest: str) -> None:
    row, column = torch.arange(19)[:, None], torch.arange(70)[None, :]
    codes = ((row * 7 + column * 3 + column // 16) % (1 << bits)).to(torch.uint8)
    packed = pack_planes(codes, bits)
    assert packed.shape == (2, 3, bits, 16, 4) and packed.is_contiguous()
    assert torch.equal(unpack_planes(packed, 19, 70, bits), codes)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == digest


def test_planes_of_three_bits() -> None:
    """One code that is not zero, of row 2 and column 13: quad 3 (columns 12 to 15), byte 1."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[2, 13] = 0b110
    packed = pack_planes(codes, 3)[0, 0]
    assert packed.count_nonzero() == 2
    assert packed[0, 2, 1] == 0b10 << 6  # 2-bit plane: quads 0 to 3 in the first register
    assert packed[2, 2, 1] == 1 << 3  # 1-bit plane


@needs_module
def test_threads_share_the_work_of_torch() -> None:
    """More row blocks than threads, split over torch's own OpenMP runtime; the result does not depend on the split."""
    kernel = CpuIntKernel()
    packed = kernel.prepare(weight(1030, 512, 64))
    x = torch.randn(2, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((kernel.linear(x, packed, None), kernel.rows(packed, torch.arange(1030))))
    finally:
        torch.set_num_threads(before)
    for y, rows in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(rows, results[0][1])
    if sys.platform == "linux" and "openmp" in torch.__config__.parallel_info().lower():
        assert native.cpu_module().has_openmp_runtime()


def int_weight(**values: int | str) -> object:
    t = torch.zeros(4096, dtype=torch.uint8)
    known = {"isa": 0, "activations": "int8", "bits": 4, "out": 16, "in_features": 96, "group_size": 0}
    return native.cpu_module().int_weight(codes=t.data_ptr(), scale=t.data_ptr(), zero=0, **{**known, **values})


@needs_module
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 48}, "group_size 48 is no multiple of 32"),
        ({"isa": 9}, "no instruction set 9"),
        ({"out": 0}, r"a weight \[0, 96\]"),
        ({"bits": 9}, "9 bits, not 1 to 8"),
        ({"bits": 0}, "0 bits, not 1 to 8"),
        ({"activations": "int3"}, "no activations int3"),
    ],
)
def test_int_weights_that_make_no_sense(values: dict, message: str) -> None:
    int_weight()
    with pytest.raises(ValueError, match=message):
        int_weight(**values)


@needs_module
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "5 bits, not 2 to 4"),
        ({"entries": 17}, "a table of 17 entries and codes of 4 bits"),
        ({"entries": 8}, "a table of 8 entries and codes of 4 bits"),
        ({"activations": "exact"}, "no kernel for input form 3 and a table"),
    ],
)
def test_tables_that_make_no_sense(values: dict, message: str) -> None:
    t = torch.zeros(4096, dtype=torch.uint8)
    names = ("codes", "scale", "table", "table_bytes", "table_unit")
    known = {"isa": 0, "activations": "int8", "table_by_row": False, "entries": 16, "bits": 4, "out": 16}
    sizes = {"in_features": 96, "group_size": 0}
    addresses = {name: t.data_ptr() for name in names}
    native.cpu_module().lut_weight(**addresses, **known, **sizes)
    with pytest.raises(ValueError, match=message):
        native.cpu_module().lut_weight(**addresses, **{**known, **sizes, **values})


@needs_module
def test_calls_that_make_no_sense() -> None:
    kernel = CpuIntKernel()
    packed = kernel.prepare(weight(19, 70, 32))
    for row in (-1, 19):
        with pytest.raises(ValueError, match=f"row {row} of a weight with 19"):
            kernel.rows(packed, torch.tensor([3, row]))


@needs_module
def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(NativeError, match="instruction set 'sse9'"):
        CpuIntKernel("sse9").prepare(weight(19, 70, 32))


@needs_module
@pytest.mark.parametrize("isa", native.available_isas())
def test_the_environment_forces_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    assert native.chosen_isa() == isa
    kernel = CpuIntKernel()
    kernel.rows(kernel.prepare(weight(19, 70, 32)), torch.tensor([0]))
    assert kernel._isa_index == native.isa_index(isa)
    monkeypatch.setenv(native.ISA_VARIABLE, "avx9000")
    with pytest.raises(NativeError, match=r"'avx9000': this machine runs .*BITPALETTE_CPU_ISA"):
        CpuIntKernel().prepare(weight(19, 70, 32))
