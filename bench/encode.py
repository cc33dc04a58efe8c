"""What the trellis search takes: microseconds for a weight, by window, rate and instruction set.

    python bench/encode.py [--window 16 ...] [--bits 2 ...] [--isa avx512 ...] [--rounds 9] [--threads 1] [--json FILE]
    python bench/encode.py --model DIR [--window 12 ...] [--bits 3 ...] [--layers N] [--threads 2] [--json FILE]

Inputs are N(0, 1) at the deviation that the codec gives them. The contenders take turns, so that a slow moment of the
machine hits all of them; rows give the median of the rounds with p20 and p80. Time is the process's CPU time, which
leaves out what other processes take, though not that they share caches and clock; with --threads 2 and more the wall
time tells how the search scales. The error is that of all rounds' weights, against 2^(-2 bits).

With --model every linear layer of a checkpoint's decoder goes through `quantize_tensor` instead, rotated and without
error feedback: seconds of wall time in the encoder, and of all, from reading a weight to its packed codes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from bitpalette.provenance import commit, processor
from bitpalette.quant import trellis
from bitpalette.quant.native import available_isas, chosen_isa, cpu_module, isa_index
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.trellis import DEVIATION, WINDOWS, TrellisScheme, best_input_scale

BITS = (1.0, 1.5, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
TARGETS = {16: 1.4, 14: 0.37, 12: 0.13}
"""Microseconds for a weight, by window, aimed at on one AVX-512 core."""

WEIGHTS = {16: 8 * 256, 14: 32 * 256, 12: 128 * 256}
"""Of a round: some milliseconds with vectors, whole tiles enough to average those that need a second pass."""

SCALAR_WEIGHTS = 256

MODEL_TARGET_US = {16: 1.69, 12: 0.188}
"""Microseconds of wall time for a weight of a model, by window, aimed at on two AVX-512 cores: SmolLM2-135M, 106 M
weights, in 3 minutes and in 20 seconds."""


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


@dataclass(frozen=True)
class ModelRow:
    """A whole model's decoder layers through the quantizer; wall time, and the encoder's CPU time on all threads."""

    model: str
    window: int
    bits: float
    isa: str
    threads: int
    tensors: int
    weights: int
    encode_seconds: float
    encode_cpu_seconds: float
    seconds: float
    encode_us: float
    us: float
    target_us: float | None
    device: str
    commit: str


def decoder_linears(folder: Path, layers: int | None) -> list[tuple[Path, str, int]]:
    """(file, name, weights) of every 2-D weight of model.layers.*, in the files' order; of the first layers only."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file handle, not a dict
                parts = name.split(".")
                shape = tensors.get_slice(name).get_shape()
                inside = parts[:2] == ["model", "layers"] and (layers is None or int(parts[2]) < layers)
                if inside and parts[-1] == "weight" and len(shape) == 2:
                    found.append((file, name, math.prod(shape)))
    if not found:
        raise typer.BadParameter(f"--model {folder}: no model.layers.*.weight in {folder}/*.safetensors")
    return found


class EncoderClock:
    """While entered, the time that `bitpalette.quant.trellis.encode` takes."""

    seconds = cpu_seconds = 0.0

    def __enter__(self) -> EncoderClock:
        self._encode = trellis.encode
        trellis.encode = self._timed
        return self

    def __exit__(self, *_: object) -> None:
        trellis.encode = self._encode

    def _timed(self, x: Tensor, row_bits: int, window: int) -> tuple[Tensor, Tensor]:
        wall, cpu = time.perf_counter(), time.process_time()
        found = self._encode(x, row_bits, window)
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return found


def encode_model(folder: Path, scheme: TrellisScheme, threads: int, layers: int | None, progress: Progress) -> ModelRow:
    linears = decoder_linears(folder, layers)
    weights = sum(n for _, _, n in linears)
    task = progress.add_task(f"L = {scheme.window}, {scheme.rate:g} bits", total=len(linears))
    began = time.perf_counter()
    with EncoderClock() as clock:
        for file, name, _ in linears:
            with safe_open(file, framework="pt") as tensors:
                quantize_tensor(tensors.get_tensor(name), scheme, solver="rtn")
            progress.advance(task)
    seconds = time.perf_counter() - began
    return ModelRow(
        model=folder.name,
        window=scheme.window,
        bits=scheme.rate,
        isa=chosen_isa(),
        threads=threads,
        tensors=len(linears),
        weights=weights,
        encode_seconds=round(clock.seconds, 3),
        encode_cpu_seconds=round(clock.cpu_seconds, 3),
        seconds=round(seconds, 3),
        encode_us=round(1e6 * clock.seconds / weights, 4),
        us=round(1e6 * seconds / weights, 4),
        target_us=MODEL_TARGET_US.get(scheme.window),
        device=processor(),
        commit=commit() or "installed",
    )


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main(
    window: Annotated[list[int] | None, typer.Option(help="12, 14 or 16; may be repeated", show_default="all")] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option(help="1 to 5 in sixteenths; may be repeated", show_default="nine rates, 3 with --model"),
    ] = None,
    isa: Annotated[list[str] | None, typer.Option(help="may be repeated", show_default="all but scalar")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    model: Annotated[Path | None, typer.Option(help="folder of a checkpoint whose decoder to encode instead")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="with --model, its first layers", show_default="all")
    ] = None,
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
    if model is not None:
        if isa is not None:
            raise typer.BadParameter("--isa: with --model the environment says it, BITPALETTE_CPU_ISA=avx2")
        schemes = [
            TrellisScheme(rate, size, transforms=("rotate",)) for size in window or WINDOWS for rate in bits or (3,)
        ]
        encoded = run_model(model, schemes, threads, layers)
        show_model(encoded)
        write(json_file, encoded)
        return
    contenders = [
        Contender(TrellisScheme(rate, size), name, threads * (SCALAR_WEIGHTS if name == "scalar" else WEIGHTS[size]))
        for size in window or WINDOWS
        for rate in bits or BITS
        for name in isas
    ]
    for i in range(-1, rounds):  # one round to warm up: tables and memory are made then
        for contender in contenders:
            contender.round(threads, keep=i >= 0)
    rows = [contender.row(threads, processor(), commit() or "installed") for contender in contenders]
    show(rows)
    write(json_file, rows)


def run_model(folder: Path, schemes: list[TrellisScheme], threads: int, layers: int | None) -> list[ModelRow]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        return [encode_model(folder, scheme, threads, layers, progress) for scheme in schemes]


def write(json_file: Path | None, rows: Sequence[Row | ModelRow]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show_model(rows: list[ModelRow]) -> None:
    first = rows[0]
    title = f"{first.model}, {first.device}, {first.isa}, {first.threads} thread(s), commit {first.commit}"
    table = Table(
        "window",
        "bits",
        "weights",
        "s in encoder",
        "CPU s",
        "s in all",
        "us/weight",
        "target",
        "us in all",
        title=title,
    )
    for r in rows:
        table.add_row(
            str(r.window),
            f"{r.bits:g}",
            str(r.weights),
            f"{r.encode_seconds:.2f}",
            f"{r.encode_cpu_seconds:.2f}",
            f"{r.seconds:.2f}",
            f"{r.encode_us:.3f}",
            "" if r.target_us is None else f"{r.target_us:g}",
            f"{r.us:.3f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


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
