"""Our kernels beside other libraries' on one linear layer, interleaved round by round in one process.

    python bench/peers.py [--shape 4096x4096 ...] [--tokens 1 ...] [--scheme int,bits=4,group_size=128 ...]
                          [--threads 1] [--rounds 40] [--clock wall] [--memory 2GiB] [--csv FILE] [--json FILE]

Peers are those that are installed: ONNX Runtime (MatMulNBits), ggml (the libggml of llama-cpp-python), bitsandbytes
(NF4); torch's own linears take part as well. `pip install 'bitpalette[bench]'` brings all. How a round goes, and what
the figures mean, is in docs/kernels.md. With two threads and more, libraries with thread pools of their own disturb
each other by waiting actively: set OMP_WAIT_POLICY=passive, or compare pairs (--peer).
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import peer_bitsandbytes
import peer_ggml
import peer_onnxruntime
import torch
import typer
from peer_weight import make_source
from rich.console import Console
from rich.table import Table

from bitpalette.calibrate.plan import PlanError
from bitpalette.commands.bench_kernels import parse_binary_size
from bitpalette.kernel_bench.baselines import NAMES, baseline
from bitpalette.kernel_bench.contender import (
    Absent,
    Call,
    Contender,
    expected_output,
    packed_contender,
    scheme_label,
    variants,
)
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernel_bench.rounds import CLOCKS, MARGIN, Timed, make_reader, speed_over, time_rounds
from bitpalette.kernel_bench.rows import Place, Row, absent_row, row_of
from bitpalette.kernel_bench.run import cache_bytes, check_clock
from bitpalette.kernel_bench.shapes import Layer, choose_layers, choose_schemes
from bitpalette.kernels.registry import kernels
from bitpalette.provenance import commit, processor
from bitpalette.quant.native import NativeError, available_isas, chosen_isa
from bitpalette.quant.scheme import SchemeError

PEERS = {
    "onnxruntime": peer_onnxruntime.contenders,
    "ggml": peer_ggml.contenders,
    "bitsandbytes": peer_bitsandbytes.contenders,
}
SCHEMES = (
    "int,bits=4,group_size=128",
    "int,bits=2,group_size=128",
    "lut,entries=16,group_size=128",
    *(f"trellis,rate={rate:g}" for rate in (2, 2.5, 3, 4)),
)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is as the peer: median, p20 and p80 of the rounds that both took part in."""

    layer: str
    out_features: int
    in_features: int
    tokens: int
    threads: int
    ours: str
    peer: str
    median: float
    p20: float
    p80: float
    rounds: int


def label(timed: Timed) -> str:
    c = timed.contender
    return " ".join(part for part in (c.kernel, c.isa, c.scheme) if part)


def ours(layer: Layer, schemes: list[str], x: torch.Tensor, dtype: torch.dtype) -> list[Contender | Absent]:
    """Each scheme on the kernels that run it with the chosen instruction set; the reference is left out."""
    found: list[Contender | Absent] = []
    names = [name for name in kernels() if name != "reference"]
    generator = torch.Generator().manual_seed(0)
    for scheme in choose_schemes(schemes):
        try:
            qt = random_weight(scheme, layer.shape, generator)
        except SchemeError as error:
            found.append(Absent("", scheme_label(scheme), str(error)))
            continue
        able = list(variants(scheme, layer.shape, names, [chosen_isa()]))
        if not able:
            found.append(Absent("", scheme_label(scheme), f"none of {names} runs it"))
            continue
        expected = expected_output(qt, x, dtype)
        found += [packed_contender(kernel, isa, qt, dtype, expected) for isa, kernel in able]
    return found


def measure(
    layer: Layer,
    tokens: list[int],
    schemes: list[str],
    peers: list[str],
    threads: int,
    rounds: int,
    memory: int,
    clock: str,
) -> tuple[list[Row], list[Ratio]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(max(tokens), layer.shape[1], generator=generator)
    found = ours(layer, schemes, x, torch.float32)
    found += [baseline(name, layer.shape, generator) for name in NAMES]
    source = make_source(layer.shape, x)
    for peer in peers:
        found += PEERS[peer](source, threads)
    entered: list[tuple[Contender, list[Call], int]] = [(c, [], threads) for c in found if isinstance(c, Contender)]
    cache = cache_bytes()
    reader = make_reader(min(int(MARGIN * cache), memory // 4))
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for count in tokens:
        place = Place(layer, count, threads, clock, cache, processor(), commit() or "installed")
        timed = time_rounds(
            entered,
            x[:count],
            rounds=rounds,
            seconds=2.0,
            memory=memory,
            cache=cache,
            reader=reader,
            clock=CLOCKS[clock],
        )
        baselines = {t.contender.kernel: t for t in timed if t.contender.kernel in NAMES}
        rows += [row_of(t, place, baselines) for t in timed]
        rows += [absent_row(a, place) for a in found if isinstance(a, Absent)]
        own = {id(t) for t in timed if t.contender.kernel in kernels()}
        for a in (t for t in timed if id(t) in own):
            for b in (t for t in timed if id(t) not in own):
                if (speed := speed_over(a, b)) is not None:
                    common = len(a.seconds.keys() & b.seconds.keys())
                    ratios.append(
                        Ratio(
                            layer=layer.name,
                            out_features=layer.shape[0],
                            in_features=layer.shape[1],
                            tokens=count,
                            threads=threads,
                            ours=label(a),
                            peer=label(b),
                            median=round(speed.median, 3),
                            p20=round(speed.p20, 3),
                            p80=round(speed.p80, 3),
                            rounds=common,
                        )
                    )
    return rows, ratios


def show(rows: list[Row], ratios: list[Ratio]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    first = rows[0]
    console.print(f"[bold]{first.layer} {first.out_features} x {first.in_features}, tokens: {first.tokens}[/bold]")
    table = Table(box=None)
    for column in ("", "scheme"):
        table.add_column(column, overflow="fold")
    for column in ("bits", "rounds", "median us", "p20", "p80", "Gw/s", "GB/s", "of read", "p20", "p80"):
        table.add_column(column, justify="right")
    for r in rows:
        name = " ".join(part for part in (r.kernel, r.isa) if part)
        if r.median_us is None:
            continue
        shares = [f"{v:.0%}" if v is not None else "" for v in (r.read_share, r.read_share_p20, r.read_share_p80)]
        times = [f"{v:.1f}" for v in (r.median_us, r.p20_us or 0, r.p80_us or 0)]
        rates = [f"{r.gweights_per_s:.2f}", f"{r.gbytes_per_s:.2f}"]
        table.add_row(name, r.scheme, f"{r.packed_bits:.3f}", str(r.rounds), *times, *rates, *shares)
    console.print(table)
    for r in rows:
        if r.note and r.from_memory is None:
            console.print(" ".join(f"{r.kernel} {r.scheme}".split()) + f": {r.note}")
    if any(r.from_memory is False for r in rows):
        console.print(next(r.note for r in rows if r.from_memory is False))
    columns = list(dict.fromkeys(q.ours for q in ratios))
    table = Table("ours is faster than the peer by: median (p20-p80)", *columns, box=None)
    for peer in dict.fromkeys(q.peer for q in ratios):
        of_peer = {q.ours: q for q in ratios if q.peer == peer}
        cells = (of_peer.get(name) for name in columns)
        table.add_row(peer, *(f"{q.median:.2f} ({q.p20:.2f}-{q.p80:.2f})" if q else "" for q in cells))
    console.print(table)
    console.print(
        f"{first.device}, threads: {first.threads}, {first.clock} time, cache {first.cache_mib:g} MiB, "
        f"commit {first.commit}\n"
    )


def main(
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN; may be repeated", show_default="4096x4096")] = None,
    model: Annotated[list[str] | None, typer.Option(help="as `quantize bench kernels` has them")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated", show_default="1")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="may be repeated", show_default="all installed")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=4)] = 40,
    clock: Annotated[str, typer.Option(help="wall, or cpu: for one thread on a shared machine")] = "wall",
    memory: Annotated[str, typer.Option(help="most that all weights together may take, about")] = "2GiB",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write the rows there")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows and ratios there")] = None,
) -> None:
    """Time one linear layer with our kernels and with other libraries'."""
    for name in peer or ():
        if name not in PEERS:
            raise typer.BadParameter(f"--peer is one of {list(PEERS)}, got {name!r}")
    if not available_isas():
        raise typer.BadParameter("the CPU extension is not built: there is nothing to measure")
    try:
        layers, nbytes = choose_layers(shape or (), model or ()), parse_binary_size(memory)
        choose_schemes(scheme or SCHEMES)
        check_clock(clock, [threads])
    except (PlanError, NativeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    rows: list[Row] = []
    ratios: list[Ratio] = []
    counts = sorted(set(tokens or [1]))
    torch.set_num_threads(threads)
    for layer in layers:
        some, other = measure(
            layer, counts, list(scheme or SCHEMES), list(peer or PEERS), threads, rounds, nbytes, clock
        )
        rows += some
        ratios += other
        for count in counts:
            show([r for r in some if r.tokens == count], [q for q in other if q.tokens == count])
        if csv_file is not None:
            with csv_file.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(asdict(rows[0])))
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
        if json_file is not None:
            content = {"rows": [asdict(r) for r in rows], "ratios": [asdict(q) for q in ratios]}
            json_file.write_text(json.dumps(content, indent=1) + "\n")
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
