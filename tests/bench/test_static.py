"""The gate of bench/static.py: what it calls kernels, what it lets through, and what it refuses."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import static
import static_budget
from static_compile import ARCHITECTURES, Compiled, compile_file, launch_bounds, resource_usage
from static_kernels import Kernel, UnknownKernelError, kernel
from static_sass import Instruction

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("c++filt") is None,
    reason="no nvcc or c++filt on PATH: nothing compiles",
)

GEMM = "gemm_kernel<GemmShape<8, 2, 4, 1>, W4A16<IntFragment<Half, 4> > >"


@pytest.mark.parametrize(
    ("demangled", "name", "tokens", "weights", "matrix"),
    [
        (GEMM, "gemm int4 fp16 8 tokens", 8, 128, 16),
        ("gemm_kernel<GemmShape<32, 4, 2, 1>, W4A16<PairFragment<BFloat> > >", "gemm lut4 bf16 32 tokens", 32, 128, 64),
        (
            "gemm_kernel<GemmShape<64, 4, 1, 2>, ChannelA8<Half, 8> >",
            "gemm_w4a8 int8 channel fp16 64 tokens",
            64,
            64,
            32,
        ),
        ("gemm_kernel<GemmShape<8, 2, 4, 1>, GroupedA8<Half> >", "gemm_w4a8 int4 grouped fp16 8 tokens", 8, 128, 8),
        (
            "gemm_kernel<GemmShape<8, 2, 4, 1>, W4A16<TrellisFragment<Half, 20> > >",
            "gemm trellis 2.5 bits fp16 8 tokens",
            8,
            128,
            16,
        ),
        ("gemv_i8_kernel<20, 1>", "gemv_i8 trellis 2.5 bits 1 vector", 1, 128, 0),
        ("gemv_i8_kernel<0, 4>", "gemv_i8 trellis any rate 4 vectors", 4, 128, 0),
        ("dequantize_kernel<(Format)4, (Dtype)2>", "dequantize progressive bf16", 0, 0, 0),
        ("transform_input_kernel<(Dtype)0, false>", "transform_input fp32 rows in global", 0, 0, 0),
    ],
)
def test_names(demangled: str, name: str, tokens: int, weights: int, matrix: int) -> None:
    found = kernel(demangled)
    assert (found.name, found.tokens, found.weights, found.matrix) == (name, tokens, weights, matrix)


@pytest.mark.parametrize("name", ["gemm_kernel<GemmShape<8, 2, 4, 1>, W4A16<NewFragment<Half> > >", "new_kernel<3>"])
def test_an_unknown_kernel_is_an_error(name: str) -> None:
    with pytest.raises(UnknownKernelError, match="must learn it"):
        kernel(name)


def test_budgets_are_those_of_the_memory() -> None:
    """4 bits on an H100: 2.47 bit operations and 4.9 instructions a weight, and 25 % more."""
    limit = static_budget.budget(kernel(GEMM))
    assert limit is not None
    assert limit.alu == pytest.approx(2.47 * 1.25, rel=0.01) and limit.issue == pytest.approx(4.95 * 1.25, rel=0.01)
    assert static_budget.budget(kernel(GEMM.replace("<8, 2, 4, 1>", "<16, 2, 4, 1>"))) is None


def test_budgets_of_the_trellis_are_those_of_its_decoder() -> None:
    def limit(name: str) -> tuple[float, float]:
        found = static_budget.budget(kernel(name))
        assert found is not None
        return found.alu / 1.25, found.issue / 1.25

    assert limit("gemv_i8_kernel<16, 1>") == pytest.approx((1.74 + 0.5, 3.6 + 0.5))
    assert limit("gemv_i8_kernel<0, 2>") == pytest.approx((1.74 + 0.5 + 3 / 8, 3.6 + 0.5 + 3 / 8 + 1))
    gemm = GEMM.replace("IntFragment<Half, 4>", "TrellisFragment<Half, 16>")
    assert limit(gemm) == pytest.approx((2.25 + 0.5, 4.6 + 0.5))
    assert limit(gemm.replace("Half", "BFloat")) == pytest.approx((2.25 + 0.5, 4.6 + 1))


# -- a kernel that is right, and what is wrong with it when it is changed

LOOP = Counter({"HMMA.16816.F32": 16, "LDS.128": 4, "LDS.64": 4, "LDGSTS.E.BYPASS.128": 7, "LOP3.LUT": 120, "IMAD": 90})


def compiled(loop: Counter[str] = LOOP, before: tuple[str, ...] = ("MOV",), form: Kernel | None = None) -> Compiled:
    """A kernel with that loop: opcodes and how many of each; the last instruction goes back to the first of them."""
    opcodes = [*before, *loop.elements(), "BRA"]
    code = []
    for i, opcode in enumerate(opcodes):
        name, dot, modifiers = opcode.partition(".")
        operands = f"0x{16 * len(before):x}" if name == "BRA" else "R0"
        code.append(Instruction(16 * i, name, dot + modifiers, operands, ""))
    return Compiled(form or kernel(GEMM), "gemm_w4a16", "sm_80", 128, 0, 0, 0, 256, 2, code)


def test_a_good_kernel_passes() -> None:
    assert static_budget.violations(compiled()) == []


def changed(**counts: int) -> Counter[str]:
    """LOOP with other numbers of some opcodes, `LDS_64` for LDS.64."""
    return Counter({**LOOP, **{name.replace("_", "."): n for name, n in counts.items()}})


@pytest.mark.parametrize(
    ("kernel_", "said"),
    [
        (lambda: replace(compiled(), spill=8), "8 bytes spilled, 0 bytes of stack"),
        (lambda: replace(compiled(), stack=16), "0 bytes spilled, 16 bytes of stack"),
        (lambda: compiled(before=("STL", "LDL.64")), "2 loads and stores of local memory"),
        (lambda: replace(compiled(), registers=129), "129 registers x 256 threads x 2 blocks are 69632"),
        (lambda: compiled(changed(HMMA_16816_F32=32)), "32 matrix instructions in the main loop; unrolled they are 16"),
        (lambda: compiled(changed(LDGSTS_E_BYPASS_128=0)), "0 of 0 asynchronous copies"),
        (lambda: compiled(changed(LDGSTS_E=1)), "7 of 8 asynchronous copies"),
        (lambda: compiled(changed(LDS_128=3)), "3 LDS.128 in the main loop; the weights alone are 4"),
        (lambda: compiled(changed(I2F=1)), r"1 conversions of integers \(I2F\)"),
        (lambda: compiled(changed(LOP3_LUT=396)), "3.09 ALU instructions a weight; the budget is 3.08"),
        (lambda: compiled(changed(IMAD=641)), "6.20 issued instructions a weight; the budget is 6.19"),
    ],
)
def test_a_violation_is_reported(kernel_: Callable[[], Compiled], said: str) -> None:
    [line] = static_budget.violations(kernel_())
    assert line.startswith("gemm int4 fp16 8 tokens sm_80: ")
    assert re.search(said, line), line


def test_two_bits_are_read_by_64() -> None:
    two = kernel(GEMM.replace("Half, 4", "Half, 2"))
    loop = changed(LDS_128=0, LDS_64=8, LOP3_LUT=60)
    assert static_budget.violations(compiled(loop, form=two)) == []
    [line] = static_budget.violations(compiled(loop - Counter({"LDS.64": 1}), form=two))
    assert "7 LDS.64 in the main loop; weights and tokens are 8 at least" in line


def test_a_gemm_without_a_loop_is_refused() -> None:
    code = [Instruction(0, "EXIT", "", "", "")]
    [line] = static_budget.violations(replace(compiled(), code=code))
    assert "no loop at all" in line


# -- what the compilers say


def test_reads_what_ptxas_says() -> None:
    log = textwrap.dedent("""\
        ptxas info    : 0 bytes gmem
        ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
        ptxas info    : Function properties for _Z1av
            24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
        ptxas info    : Used 158 registers, used 1 barriers, 48 bytes smem, 536 bytes cmem[0]
        ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
        ptxas info    : Function properties for _Z1bv
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Used 32 registers, 360 bytes cmem[0]
        """)
    assert resource_usage(log) == {"_Z1av": (158, 36, 24, 48), "_Z1bv": (32, 0, 0, 0)}


def test_reads_launch_bounds() -> None:
    ptx = textwrap.dedent("""\
        .visible .entry _Z1av(
            .param .align 8 .b8 _Z1av_param_0[184]
        )
        .maxntid 256, 1, 1
        .minnctapersm 2
        {
            ret;
        }
        .visible .entry _Z1bv()
        {
            ret;
        }
        """)
    assert launch_bounds(ptx) == {"_Z1av": (256, 2), "_Z1bv": (1024, 1)}


SPILLS = """
__global__ void __launch_bounds__(256, BLOCKS) spills(const float* x, float* y) {
    float v[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + 32 * i];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) y[threadIdx.x + 32 * i] = v[i] * v[63 - i] + v[(i + 17) % 64];
}
"""


@needs_nvcc
def test_a_kernel_that_spills_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spills.cu"
    path.write_text(SPILLS)
    [found] = compile_file(path, "sm_80", ["-DBLOCKS=8"], Kernel("spills", "test"))
    assert found.registers <= 32 and found.spill > 0
    spilled, local = static_budget.violations(found)
    assert f"{found.spill} bytes spilled" in spilled and "local memory" in local
    [free] = compile_file(path, "sm_80", ["-DBLOCKS=1"], Kernel("spills", "test"))
    assert static_budget.violations(free) == []


@needs_nvcc
@pytest.mark.slow
def test_the_int8_gemm_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert static.main(["--arch", "sm_80", "--file", "gemm_w4a8", "--jobs", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("no violations\n") and "gemm_w4a8 int4 progressive fp16 8 tokens" in said
    rows = static.read_rows(tmp_path / "sm_80.csv")
    assert {row["matrix"] for row in rows} == {"8", "16", "32"} and {row["spill"] for row in rows} == {"0"}


# -- the table


def test_a_table_keeps_the_rows_of_files_that_were_not_compiled() -> None:
    old = [
        {"file": "gemv_i8", "kernel": "a"},
        {"file": "gemm_w4a16", "kernel": "b"},
        {"file": "gemm_w4a8", "kernel": "c"},
    ]
    new = [{"file": "gemm_w4a16", "kernel": "d"}]
    assert [r["kernel"] for r in static.merged(old, new, ["gemm_w4a16"])] == ["d", "c", "a"]


def test_changes_are_told() -> None:
    row = dict.fromkeys(static.COLUMNS, "0")
    old = [{**row, "kernel": "a"}, {**row, "kernel": "gone"}, {**row, "kernel": "same"}]
    new = [{**row, "kernel": "a", "registers": "9"}, {**row, "kernel": "same"}, {**row, "kernel": "b"}]
    assert static.changes(old, new) == ["gone: no such kernel any more", "a: registers 0 -> 9", "b: new"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_committed_table_passes(arch: str) -> None:
    rows = static.read_rows(static.RESULTS / f"{arch}.csv")
    assert len(rows) > 150
    assert {row["spill"] + row["stack"] for row in rows} == {"00"}
    for row in rows:
        for count, limit in (("alu_per_weight", "alu_budget"), ("issue_per_weight", "issue_budget")):
            assert not row[limit] or float(row[count]) <= float(row[limit]), row["kernel"]
