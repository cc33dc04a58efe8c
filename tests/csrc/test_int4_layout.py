"""The packed layout of csrc/cpu/int4.h, byte for byte, and what the native calls refuse."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from bitpalette.kernels.cpu_int4 import CpuInt4Kernel
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
    packed = CpuInt4Kernel().prepare(weight(19, 70, 32)).tensors
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


@needs_module
def test_threads_share_the_work_of_torch() -> None:
    """More row blocks than threads, split over torch's own OpenMP runtime; the result does not depend on the split."""
    kernel = CpuInt4Kernel()
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


@needs_module
def test_native_calls_refuse_what_makes_no_sense() -> None:
    cpu, t = native.cpu_module(), torch.zeros(4096, dtype=torch.uint8)
    a = t.data_ptr()
    with pytest.raises(ValueError, match="group_size 48 is no multiple of 32"):
        cpu.Int4Layer(0, a, a, 0, 16, 96, 48)
    with pytest.raises(ValueError, match="no instruction set 9"):
        cpu.Int4Layer(9, a, a, 0, 16, 32, 0)
    with pytest.raises(ValueError, match=r"a weight \[0, 32\]"):
        cpu.Int4Layer(0, a, a, 0, 0, 32, 0)
    with pytest.raises(ValueError, match="no dtype 7"):
        cpu.Int4Layer(0, a, a, 0, 16, 32, 0).linear(a, 0, a, 7, 1, 1)
    packed = CpuInt4Kernel().prepare(weight(19, 70, 32))
    for row in (-1, 19):
        with pytest.raises(ValueError, match=f"row {row} of 19"):
            CpuInt4Kernel().rows(packed, torch.tensor([3, row]))


@needs_module
def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(NativeError, match="instruction set 'sse9'"):
        CpuInt4Kernel("sse9").prepare(weight(19, 70, 32))


@needs_module
@pytest.mark.parametrize("isa", native.available_isas())
def test_the_environment_forces_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    assert native.chosen_isa() == isa
    kernel = CpuInt4Kernel()
    kernel.rows(kernel.prepare(weight(19, 70, 32)), torch.tensor([0]))
    assert kernel._isa_index == native.isa_index(isa)
    monkeypatch.setenv(native.ISA_VARIABLE, "avx9000")
    with pytest.raises(NativeError, match=r"'avx9000': this machine runs .*BITPALETTE_CPU_ISA"):
        CpuInt4Kernel().prepare(weight(19, 70, 32))
