"""What the trellis search takes: microseconds for a weight, by window, rate and instruction set.

    python bench/encode.py [--window 16 ...] [--bits 2 ...] [--isa avx512 ...] [--rounds 9] [--threads 1] [--json FILE]

Inputs are N(0, 1) at the deviation that the codec gives them. The contenders take turns, so that a slow moment of the
machine hits all of them; rows give the median of the rounds with p20 and p80. Time is the process's CPU time, which
leaves out what other processes take, though not that they share caches and clock; with --threads 2 and more the wall
time tells how the search scales. The error is that of all rounds' weights, against 2^(-2 bits).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bitpalette.quant.native import available_isas, cpu_module, isa_index
from bitpalette.quant.trellis import DEVIATION, WINDOWS, TrellisScheme, best_input_scale

BITS = (1.0, 1.5, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
TARGETS = {16: 1.4, 14: 0.37, 12: 0.13}
"""Microseconds for a weight, by window, aimed at on one AVX-512 core."""

WEIGHTS = {16: 8 * 256, 14: 32 * 256, 12: 128 * 256}
"""Of a round: some milliseconds with vectors, whole tiles enough to average those that need a second pass."""

SCALAR_WEIGHTS = 256


@dataclass(frozen=True)
class Row:
    window: int
    bits: float
    isa: str
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    wall_median_us: float
    target_us: float | None
    weights: int
    exact_tiles: int
    mse: float
    gap_db: float
    device: str
    commit: str


@dataclass
class Contender:
    """One code on one instruction set: its input and what the rounds took."""

    scheme: TrellisScheme
    isa: str
    weights: int
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    exact: int = 0
    error: float = 0.0

    def round(self, threads: int, keep: bool) -> None:
        tiles = self.weights // 256
        unit = DEVIATION * best_input_scale(self.scheme)
        x = torch.randn(tiles, 256) * unit
        codes = torch.empty(tiles, 2 * self.scheme.row_bits, dtype=torch.uint8)
        chosen = torch.empty_like(x)
        code = (self.scheme.row_bits, self.scheme.window)
        wall, cpu = time.perf_counter(), time.process_time()
        exact = cpu_module().trellis_encode(
            isa_index(self.isa), x.data_ptr(), tiles, *code, codes.data_ptr(), chosen.data_ptr(), threads
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if keep:
            self.cpu.append(1e6 * cpu / self.weights)
            self.wall.append(1e6 * wall / self.weights)
            self.exact += exact
            self.error += float(((x - chosen) / unit).double().square().sum())

    def row(self, threads: int, device: str, commit: str) -> Row:
        scheme = self.scheme
        total = self.weights * len(self.cpu)
        mse = self.error / total
        return Row(
            window=scheme.window,
            bits=scheme.rate,
            isa=self.isa,
            threads=threads,
            median_us=round(quantile(self.cpu, 0.5), 4),
            p20_us=round(quantile(self.cpu, 0.2), 4),
            p80_us=round(quantile(self.cpu, 0.8), 4),
            wall_median_us=round(quantile(self.wall, 0.5), 4),
            target_us=TARGETS[scheme.window] if self.isa == "avx512" else None,
            weights=total,
            exact_tiles=self.exact,
            mse=mse,
            gap_db=round(10 * math.log10(mse * 4**scheme.rate), 3),
            device=device,
            commit=commit,
        )


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def commit() -> str:
    folder = Path(__file__).resolve().parent
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return ran.stdout.strip() or "none"


def main(
    window: Annotated[list[int] | None, typer.Option(help="12, 14 or 16; may be repeated", show_default="all")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="1 to 5 in sixteenths; may be repeated")] = None,
    isa: Annotated[list[str] | None, typer.Option(help="may be repeated", show_default="all but scalar")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows there as well")] = None,
) -> None:
    """Time the search for every window, rate and instruction set."""
    if not available_isas():
        raise typer.BadParameter("the CPU extension is not built: there is nothing to measure")
    isas = isa or [name for name in available_isas() if name != "scalar"] or available_isas()
    for name in isas:
        if name not in available_isas():
            raise typer.BadParameter(f"--isa {name}: this machine runs {available_isas()}")
    for size in window or ():
        if size not in WINDOWS:
            raise typer.BadParameter(f"--window {size}: the windows are {list(WINDOWS)}")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    contenders = [
        Contender(TrellisScheme(rate, size), name, threads * (SCALAR_WEIGHTS if name == "scalar" else WEIGHTS[size]))
        for size in window or WINDOWS
        for rate in bits or BITS
        for name in isas
    ]
    for i in range(-1, rounds):  # one round to warm up: tables and memory are made then
        for contender in contenders:
            contender.round(threads, keep=i >= 0)
    rows = [contender.row(threads, device_name(), commit()) for contender in contenders]
    show(rows)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show(rows: list[Row]) -> None:
    first = rows[0]
    title = f"{first.device}, {first.threads} thread(s), commit {first.commit}; microseconds for a weight"
    columns = ["window", "bits", "", "median", "p20", "p80", "wall", "target", "weights", "mse", "gap dB"]
    table = Table(*columns, title=title)
    for i, r in enumerate(rows):
        table.add_row(
            str(r.window),
            f"{r.bits:g}",
            r.isa,
            *(f"{v:.3f}" for v in (r.median_us, r.p20_us, r.p80_us, r.wall_median_us)),
            "" if r.target_us is None else f"{r.target_us:g}",
            str(r.weights),
            f"{r.mse:.5f}",
            f"{r.gap_db:.3f}",
            end_section=i + 1 < len(rows) and rows[i + 1].window != r.window,
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    typer.run(main)
