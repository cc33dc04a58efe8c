"""What Triton's compiler makes of every kernel, without a GPU: registers, spills, instructions, for sm_80 and sm_90.

    python bench/static_triton.py [--arch 80 90] [--match TEXT] [--quick]

prints a line a kernel and format and ends with 1 where one spills, uses local memory or lacks matrix instructions. The
binaries are those of the launches that run without tuning (`triton_launch.default_launch`) on 8192 x 8192 weights.
`per weight`: instructions of a thread in the loop with the matrix instructions, by the weights it decodes there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from static_triton_kv import kv_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitpalette.kernels.triton_activations import quantize_block, quantize_warps
from bitpalette.kernels.triton_dense import DENSE_BLOCK
from bitpalette.kernels.triton_device.activations import quantize_kernel
from bitpalette.kernels.triton_device.dense import dense_kernel
from bitpalette.kernels.triton_device.linear import linear_kernel, sum_parts_kernel
from bitpalette.kernels.triton_device.linear_int8 import linear_int8_kernel, sum_int8_parts_kernel
from bitpalette.kernels.triton_device.transform import multiply_kernel, rotate_columns_kernel, rotate_rows_kernel
from bitpalette.kernels.triton_format import TileFormat
from bitpalette.kernels.triton_launch import Launch, Problem, default_launch
from bitpalette.kernels.triton_transform import BLOCK, BLOCK_K

ARCHITECTURES = (80, 90)
PROCESSORS = {80: 108, 90: 132}  # A100, H100 SXM
SHAPE = (8192, 8192)
MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA")
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

FORMATS = [
    *(TileFormat("int", layout, 128, 8) for layout in ("bits2", "bits3", "bits4", "bits8")),
    *(TileFormat("int", layout, 32, None) for layout in ("bits2", "bits3", "bits4", "bits8")),
    TileFormat("int", "bits4", 0, 8),
    TileFormat("int", "bits4", 64, None),
    *(TileFormat("table", layout, 64) for layout in ("pairs2", "pairs3", "pairs4")),
    TileFormat("table", "pairs4", 32),
    TileFormat("e4m3", "bits8", 0),
    *(
        TileFormat("trellis", "trellis", row_bits=m, window=w)
        for m, w in [(16, 16), (33, 14), (40, 16), (48, 12), (80, 16)]
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel to compile. types: {argument: "*fp16", "i32", ...}; an argument in neither dict is None.

    weights: decoded by a thread in a step of the main loop; 0 where there is no such loop. unaligned: numbers that are
    no multiples of 16.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int = 3
    fusion: bool = True
    matrix: bool = True
    weights: float = 0
    unaligned: tuple[str, ...] = ("M", "COUNT", "LINES")


@dataclass(frozen=True)
class Report:
    """What came of it. local: bytes of stack or local memory a thread. loop: instructions of the main loop."""

    case: Case
    arch: int
    registers: int
    shared: int
    local: int
    opcodes: Mapping[str, int] = field(repr=False)
    loop: int = 0

    @property
    def matrix(self) -> int:
        return sum(self.opcodes.get(name, 0) for name in MATRIX)

    def violations(self) -> list[str]:
        """What the gate refuses, a line each."""
        name = f"{self.case.name} sm_{self.arch}"
        found = []
        if self.local or self.opcodes.get("LDL", 0) or self.opcodes.get("STL", 0):
            counts = f"{self.opcodes.get('LDL', 0)} LDL, {self.opcodes.get('STL', 0)} STL"
            found.append(f"{name}: {self.local} bytes of local memory a thread ({counts}); take a smaller block")
        if self.case.matrix and not self.matrix:
            found.append(f"{name}: no matrix instruction ({', '.join(MATRIX)})")
        return found

    def row(self) -> str:
        opcodes = " ".join(f"{name}={self.opcodes[name]}" for name in (*MATRIX, "LDGSTS") if self.opcodes.get(name))
        each = f"{self.loop / self.case.weights:6.2f}" if self.loop and self.case.weights else "     -"
        return (
            f"sm_{self.arch}  {self.case.name:64} {self.registers:4} {self.shared:7} {self.local:6} {each}  {opcodes}"
        )


HEADER = f"{'arch':6} {'kernel':64} {'regs':>4} {'shared':>7} {'local':>6} {'per weight':>6}  instructions"


def cases(arch: int) -> Iterator[Case]:
    """Every kernel and format, as it is launched on a GPU of this architecture."""
    for form in FORMATS:
        for tokens, dtype in ((1, "fp16"), (64, "bf16"), (4096, "fp16")):
            yield _linear(form, tokens, dtype, arch)
        yield _dense(form)
    for dtype in ("fp16", "bf16"):
        constants = {"HAS_BIAS": True, "PARTS": 4, "BLOCK": 1024}
        types = {"parts": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}", "SIZE": "i32", "N": "i32"}
        yield Case(f"sum of parts {dtype}", sum_parts_kernel, types, constants, 4, matrix=False)
    for form in (TileFormat("int", "bits4", 0, 8), TileFormat("int", "bits4", 0, None), *_progressive()):
        for tokens in (1, 64, 4096):
            yield _linear_int8(form, tokens, arch)
        yield _sum_int8(form)
    yield from _activations()
    for arguments in kv_cases(PROCESSORS[arch]):
        yield Case(**arguments)


def _progressive() -> list[TileFormat]:
    return [TileFormat("int", "bits4", group, None) for group in (32, 64, 128)]


def _launch(operation: str, form: TileFormat, tokens: int, arch: int) -> Launch:
    return default_launch(Problem(operation, form, "float16", SHAPE, tokens), PROCESSORS[arch])


def _blocks(launch: Launch) -> dict[str, int]:
    return {
        "BLOCK_N": launch.block_n,
        "BLOCK_M": launch.block_m,
        "BLOCK_K": launch.block_k,
        "PARTS": launch.parts,
        "STAGES": launch.stages,
    }


def _linear(form: TileFormat, tokens: int, dtype: str, arch: int) -> Case:
    launch = _launch("w16", form, tokens, arch)
    types = {"x": f"*{dtype}", "codes": "*i32", "scale": "*fp16", "y": "*fp32" if launch.parts > 1 else f"*{dtype}"}
    types |= dict.fromkeys("MNK", "i32")
    if form.zero is None:
        types["zero_point"] = "*u8"
    if form.kind == "table":
        types["table"] = "*i32"
    constants = {**form.constants(), **_blocks(launch), "HAS_BIAS": False, "SCALE_AT": form.scale_at(launch.block_k)}
    weights = launch.block_n * launch.block_k / (32 * launch.warps)
    name = f"linear {form} {dtype} M={tokens}"
    return Case(name, linear_kernel, types, constants, launch.warps, launch.stages, weights=weights)


def _linear_int8(form: TileFormat, tokens: int, arch: int) -> Case:
    launch = _launch("w8", form, tokens, arch)
    types = {"x": "*i8", "x_scale": "*fp32", "x_sum": "*i32", "codes": "*i32", "scale": "*fp16", "y": "*fp16"}
    types |= {"parts": "*i32", **dict.fromkeys("MNK", "i32"), **_int8_fields(form)}
    constants = {**_int8_constants(form), **_blocks(launch), "GROUP": form.group_size}
    weights = launch.block_n * launch.block_k / (32 * launch.warps)
    name = f"linear_w4a8 {form} M={tokens}"
    return Case(name, linear_int8_kernel, types, constants, launch.warps, launch.stages, weights=weights)


def _sum_int8(form: TileFormat) -> Case:
    types = {
        "parts": "*i32",
        "x_scale": "*fp32",
        "x_sum": "*i32",
        "scale": "*fp16",
        "y": "*fp16",
        "M": "i32",
        "N": "i32",
    }
    if "zero_point" in _int8_fields(form):
        types["zero_point"] = "*u8"
    constants = {**_int8_constants(form), "PARTS": 4, "BLOCK_N": 128, "BLOCK_M": 8}
    return Case(f"sum of w4a8 parts {form}", sum_int8_parts_kernel, types, constants, 4, matrix=False)


def _int8_fields(form: TileFormat) -> dict[str, str]:
    if form.group_size:
        return {"group_scale": "*u8", "group_offset": "*u8"}
    return {"zero_point": "*u8"} if form.zero is None else {}


def _int8_constants(form: TileFormat) -> dict[str, Any]:
    zero = form.zero is None and form.group_size == 0
    return {
        "SYMMETRIC_ZERO": form.zero or 0,
        "HAS_ZERO": zero,
        "HAS_BIAS": False,
        "PER_GROUP": form.group_size > 0,
    }


def _dense(form: TileFormat) -> Case:
    types = {
        "codes": "*i32",
        "scale": "*fp16",
        "index": "*i64",
        "y": "*fp16",
        **dict.fromkeys(("N", "K", "COUNT"), "i32"),
    }
    if form.zero is None:
        types["zero_point"] = "*u8"
    if form.kind == "table":
        types["table"] = "*i32"
    rows, columns = DENSE_BLOCK
    constants = {**form.constants(), "HAS_INDEX": True, "BLOCK_R": rows, "BLOCK_K": columns}
    return Case(f"dense {form}", dense_kernel, types, constants, 4, matrix=False)


def _activations() -> Iterator[Case]:
    block = quantize_block(SHAPE[1])
    for dtype in ("fp16", "bf16", "fp32"):
        types = {"x": f"*{dtype}", "codes": "*i8", "scale": "*fp32", "sum": "*i32", "K": "i32", "WIDTH": "i32"}
        warps = quantize_warps(block)
        name = f"quantize_activations {dtype}"
        yield Case(name, quantize_kernel, types, {"BLOCK": block}, warps, fusion=False, matrix=False)
        types = {"x": f"*{dtype}", "factors": "*fp32", "y": "*fp32", "n": "i32"}
        constants = {"HAS_ORDER": False, "HAS_FACTORS": True, "BLOCK": 1024}
        yield Case(f"multiply {dtype}", multiply_kernel, types, constants, 4, matrix=False)
        types = {
            "x": f"*{dtype}",
            "factors": "*fp32",
            "matrix": "*fp32",
            "y": "*fp32",
            **dict.fromkeys(("LINES", "a", "b"), "i32"),
        }
        constants = {"HAS_FACTORS": True, "BLOCK": BLOCK, "LINE_BLOCK": BLOCK, "BLOCK_K": BLOCK_K}
        yield Case(f"rotate rows {dtype}", rotate_rows_kernel, types, constants, 4)
        types = {"x": "*fp32", "matrix": "*fp32", "y": f"*{dtype}", "a": "i32", "b": "i32"}
        constants = {"BLOCK_A": BLOCK, "BLOCK_B": BLOCK, "BLOCK_K": BLOCK_K}
        yield Case(f"rotate columns {dtype}", rotate_columns_kernel, types, constants, 4)
    types = {"x": "*fp16", "order": "*i32", "y": "*fp16", "n": "i32"}
    constants = {"HAS_ORDER": True, "HAS_FACTORS": False, "BLOCK": 1024}
    yield Case("gather", multiply_kernel, types, constants, 4, matrix=False)


def compile_case(case: Case, arch: int) -> Report:
    """Compile for sm_<arch>; pointers and sizes, but those of `unaligned`, are multiples of 16 as they mostly are."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if name not in case.types}
    aligned = [i for i, name in enumerate(names) if name in case.types and name not in case.unaligned]
    source = ASTSource(case.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = (_tool("cuobjdump", flag, file.name) for flag in ("-res-usage", "-sass"))
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    instructions = _instructions(text)
    opcodes = Counter(name for _, name, _ in instructions)
    loop = _main_loop(instructions)
    return Report(
        case, arch, numbers["REG"], compiled.metadata.shared, numbers["STACK"] + numbers["LOCAL"], opcodes, loop
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / name, *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode without modifiers, operands) of each instruction."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*\s[^;]*)?;", re.MULTILINE)
    return [(int(m[1], 16), m[2], m[3] or "") for m in pattern.finditer(sass)]


def _main_loop(instructions: list[tuple[int, str, str]]) -> int:
    """Instructions of the shortest loop that holds every matrix instruction which a loop holds; 0 where none does."""
    best = (0, 0)  # (matrix instructions, -length)
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) < address:
            body = [n for a, n, _ in instructions if int(target[1], 16) <= a <= address]
            best = max(best, (sum(n in MATRIX for n in body), -len(body)))
    return -best[1] if best[0] else 0


NOT_QUICK = re.compile(
    r" M=(?!1$)|int bits[238] group 128|^dense int.*(channel|group (64|128))|trellis (16|33|80)/16"
    r"|kv attention .*(D=80|D=256|fp16|fp32)|kv (append|combine|rotate) .*D=(128|256)"
)
"""Names of cases that differ from others in the shape alone, of weights, tokens or heads."""


def reports(arches: tuple[int, ...] = ARCHITECTURES, match: str = "", quick: bool = False) -> Iterator[Report]:
    """A report for each case whose name holds `match`, one after another as they are compiled.

    quick: every kernel and every number of bits, without NOT_QUICK.
    """
    for arch in arches:
        for case in cases(arch):
            if match in case.name and not (quick and NOT_QUICK.search(case.name)):
                yield compile_case(case, arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--match", default="", help="only kernels whose name holds this")
    parser.add_argument("--quick", action="store_true", help="one shape of a kernel and format")
    arguments = parser.parse_args()
    print(HEADER)
    wrong, compiled = [], 0
    for report in reports(tuple(arguments.arch), arguments.match, arguments.quick):
        print(report.row(), flush=True)
        wrong += report.violations()
        compiled += 1
    if not compiled:
        wrong = [f"no kernel's name holds {arguments.match!r}; without --match all are compiled"]
    print("\n".join(wrong) or "no spills, no local memory, matrix instructions wherever there is a product")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"static-triton-{os.getuid()}"))
    sys.exit(main())
