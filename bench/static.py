"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, and instructions per weight.

    python bench/static.py [--arch sm_80 ...] [--file gemm_w4a16 ...] [--out FOLDER] [--check] [--jobs 2]
                           [--triton]

prints a line for each kernel and architecture, and ends with 1 and a line for each violation of static_budget.py.
--out writes the table, one CSV an architecture; bench/results/static has the committed one, in which a regression shows
as a difference. --check prints what has changed since: that alone is no failure, compilers differ. --triton adds the
table and the gate of static_triton.py, for the kernels that Triton compiles.

Columns: registers and bytes of spills; loop: instructions of the main loop; round: of the shortest way through it that
leaves out no product and no copy (static_sass.py), of which the rest are parts; in: loops inside; m: matrix
instructions; loads of shared memory of 128, 64, 32 and fewer bits; copies: asynchronous ones to shared memory; cvt:
conversions. Then, per weight that a lane decodes in one round: bit operations (ALU), products (FMA), loads of shared
memory, all that is issued.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

from static_budget import budget, main_loop, violations
from static_compile import ARCHITECTURES, Compiled, ToolError, compile_source, compiler_version, sources
from static_kernels import UnknownKernelError

RESULTS = Path(__file__).resolve().parent / "results" / "static"


@dataclass(frozen=True)
class Row:
    """A line of the table, as the CSV has it; "" where a kernel has no such number."""

    file: str
    kernel: str
    registers: int
    spill: int
    stack: int
    shared: int
    threads: int
    blocks: int
    instructions: int
    loop: int | str = ""
    round: int | str = ""
    inner: int | str = ""
    matrix: int | str = ""
    lds128: int | str = ""
    lds64: int | str = ""
    lds32: int | str = ""
    lds_narrow: int | str = ""
    copies: int | str = ""
    alu: int | str = ""
    fma: int | str = ""
    conversions: int | str = ""
    alu_per_weight: str = ""
    fma_per_weight: str = ""
    lds_per_weight: str = ""
    issue_per_weight: str = ""
    alu_budget: str = ""
    issue_budget: str = ""


COLUMNS = [field.name for field in fields(Row)]


def row(compiled: Compiled) -> Row:
    """The numbers of one kernel."""
    kernel, loop, limit = compiled.kernel, main_loop(compiled), budget(compiled.kernel)
    fixed = Row(
        file=compiled.file,
        kernel=kernel.name,
        registers=compiled.registers,
        spill=compiled.spill,
        stack=compiled.stack,
        shared=compiled.shared,
        threads=compiled.threads,
        blocks=compiled.blocks,
        instructions=len(compiled.code),
    )
    if loop is None:
        return fixed
    counted = replace(
        fixed,
        loop=loop.size,
        round=loop.issue,
        inner=loop.inner,
        matrix=loop.matrix,
        lds128=loop.of_width("LDS", 128),
        lds64=loop.of_width("LDS", 64),
        lds32=loop.of_width("LDS", 32),
        lds_narrow=loop.of_width("LDS", 16) + loop.of_width("LDS", 8),
        copies=loop.count({"LDGSTS"}),
        alu=loop.alu,
        fma=loop.fma,
        conversions=loop.conversions,
    )
    if not kernel.weights:
        return counted
    return replace(
        counted,
        alu_per_weight=f"{loop.alu / kernel.weights:.2f}",
        fma_per_weight=f"{loop.fma / kernel.weights:.2f}",
        lds_per_weight=f"{loop.lds / kernel.weights:.2f}",
        issue_per_weight=f"{loop.issue / kernel.weights:.2f}",
        alu_budget=f"{limit.alu:.2f}" if limit else "",
        issue_budget=f"{limit.issue:.2f}" if limit else "",
    )


SHOWN = {
    "registers": "regs",
    "spill": "spill",
    "loop": "loop",
    "round": "round",
    "inner": "in",
    "matrix": "m",
    "lds128": "L128",
    "lds64": "L64",
    "lds32": "L32",
    "lds_narrow": "L<",
    "copies": "copy",
    "conversions": "cvt",
    "alu_per_weight": "ALU",
    "fma_per_weight": "FMA",
    "lds_per_weight": "LDS",
    "issue_per_weight": "issue",
    "alu_budget": "<=ALU",
    "issue_budget": "<=iss",
}
HEADER = f"{'arch':6} {'kernel':40} " + " ".join(f"{title:>5}" for title in SHOWN.values())


def line(arch: str, r: Row) -> str:
    """The most important columns of a row, for people."""
    return f"{arch:6} {r.kernel:40} {' '.join(f'{getattr(r, name):>5}' for name in SHOWN)}".rstrip()


def compile_all(stems: Sequence[str], arches: Sequence[str], jobs: int) -> Iterator[list[Compiled]]:
    """The kernels of each file for each architecture, in this order, as they are ready."""
    with ThreadPoolExecutor(jobs) as pool:
        work = [(stem, arch) for arch in arches for stem in stems]
        yield from pool.map(lambda item: compile_source(*item), work)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV, none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def merged(old: Iterable[dict[str, str]], new: Iterable[dict[str, str]], stems: Sequence[str]) -> list[dict[str, str]]:
    """What a table becomes when only some files were compiled: the others' rows stay."""
    rows = [*(r for r in old if r["file"] not in stems), *new]
    order = sources()
    return sorted(rows, key=lambda r: order.index(r["file"]) if r["file"] in order else len(order))


def changes(old: Iterable[dict[str, str]], new: Iterable[dict[str, str]]) -> list[str]:
    """A line for each row that was added, removed or has other numbers."""
    before, after = ({r["kernel"]: r for r in rows} for rows in (old, new))
    found = [f"{name}: no such kernel any more" for name in before if name not in after]
    for name, r in after.items():
        if name not in before:
            found.append(f"{name}: new")
            continue
        other = [f"{c} {before[name].get(c, '')} -> {r[c]}" for c in COLUMNS if before[name].get(c, "") != r[c]]
        if other:
            found.append(f"{name}: {', '.join(other)}")
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--file", nargs="+", default=sources(), choices=sources(), help="of csrc/cuda")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    parser.add_argument("--check", action="store_true", help="print what differs from bench/results/static")
    parser.add_argument("--triton", action="store_true", help="Triton's kernels as well")
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2), help="compilers at once")
    return parser.parse_args(argv)


def triton_violations() -> list[str]:
    """Prints the table of Triton's kernels; what its gate refuses."""
    import static_triton  # here: it imports triton, which is not everywhere

    wrong = []
    print(static_triton.HEADER)
    for report in static_triton.reports():
        print(report.row(), flush=True)
        wrong += report.violations()
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    print(HEADER)
    wrong: list[str] = []
    tables: dict[str, list[dict[str, str]]] = {arch: [] for arch in arguments.arch}
    try:
        for kernels in compile_all(arguments.file, arguments.arch, arguments.jobs):
            for compiled in kernels:
                r = row(compiled)
                print(line(compiled.arch, r), flush=True)
                tables[compiled.arch].append({c: str(getattr(r, c)) for c in COLUMNS})
                wrong += violations(compiled)
    except (ToolError, UnknownKernelError, FileNotFoundError) as error:
        print(f"bench/static.py: {error}", file=sys.stderr)
        return 1
    for arch, rows in tables.items():
        committed = RESULTS / f"{arch}.csv"
        if arguments.check:
            old = [r for r in read_rows(committed) if r["file"] in arguments.file]
            found = changes(old, rows)
            print("\n".join(f"{arch} {text}" for text in found) or f"{arch}: as committed")
        if arguments.out:
            path = arguments.out / f"{arch}.csv"
            write_rows(path, merged(read_rows(path), rows, arguments.file))
            (arguments.out / "compiler.txt").write_text(compiler_version() + "\n")
    if arguments.triton:
        wrong += triton_violations()
    print("\n".join(wrong) or "no violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
