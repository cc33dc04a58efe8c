"""One decode step (a single token) through linear layers: 4-bit packed weights against torch's bf16 and fp32.

    python bench/decode.py [--model smollm2|llama8b|all] [--rounds 40] [--threads 1] [--csv FILE]

The contenders take turns call by call, so that a slow moment of the machine hits all of them. Each has enough copies of
its weight to exceed --footprint-mib, and goes round them, so that weights come from memory and not from a cache, as far
as --memory-mib allows; a footprint below the last-level cache measures the cache. Rows give the median of the rounds
with p20 and p80, weight bytes per second, and that as a share of the bandwidth at which torch reads memory here.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.int import IntScheme
from bitpalette.quant.native import available_isas, chosen_isa
from bitpalette.quant.tensor import QuantizedTensor, field_specs

SHAPES = {
    "smollm2": {"q,o": (576, 576), "k,v": (192, 576), "gate,up": (1536, 576), "down": (576, 1536)},
    "llama8b": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
}
SCHEME = IntScheme(bits=4, group_size=64)
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    model: str
    layer: str
    out_features: int
    in_features: int
    contender: str
    copies: int
    footprint_mib: int
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    share_of_read: float
    times_bf16: float
    times_fp32: float
    threads: int
    isa: str
    device: str
    commit: str


def random_quantized(out: int, n: int) -> QuantizedTensor:
    """Fields filled at random: the time does not depend on the values."""
    fields = {}
    for name, (shape, dtype) in field_specs(SCHEME, (out, n)).items():
        is_scale = dtype == torch.float16
        fields[name] = torch.rand(shape).half() * 0.01 if is_scale else torch.randint(0, 256, shape, dtype=dtype)
    return QuantizedTensor(SCHEME, (out, n), fields)


def held(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def contenders(out: int, n: int) -> dict[str, tuple[Callable[[], nn.Module], torch.dtype]]:
    """{name: (how to make one layer, the dtype of its input)}"""

    def packed() -> nn.Module:
        layer = QuantLinear.from_tensor(random_quantized(out, n))
        layer.prepare()
        return layer

    def dense(dtype: torch.dtype) -> Callable[[], nn.Module]:
        return lambda: nn.Linear(n, out, bias=False, dtype=dtype)

    return {
        "int4": (packed, torch.bfloat16),
        "bf16": (dense(torch.bfloat16), torch.bfloat16),
        "fp32": (dense(torch.float32), torch.float32),
    }


def read_bandwidth() -> float:
    """Bytes per second at which torch sums a buffer of 512 MiB; the best of 5."""
    buffer = torch.ones(128 * MIB)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.numel() * 4 / (time.perf_counter() - start))
    return best


@torch.inference_mode()
def measure(out: int, n: int, rounds: int, footprint: int, memory: int) -> dict[str, tuple[list[float], int, int]]:
    """{contender: (seconds of each round, weight bytes of one layer, copies)}"""
    layers: dict[str, list[nn.Module]] = {}
    inputs = {}
    for name, (make, dtype) in contenders(out, n).items():
        first = make()
        copies = max(1, min(-(-footprint // held(first)), memory // (3 * held(first))))
        layers[name] = [first, *(make() for _ in range(copies - 1))]
        inputs[name] = torch.randn(1, 1, n, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(-3, rounds):  # three rounds to warm up
        for name, group in layers.items():
            layer, x = group[i % len(group)], inputs[name]
            start = time.perf_counter()
            layer(x)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: (times, held(layers[name][0]), len(layers[name])) for name, times in seconds.items()}


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
    model: Annotated[str, typer.Option(help="smollm2, llama8b or all")] = "all",
    rounds: Annotated[int, typer.Option(min=5)] = 40,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    footprint_mib: Annotated[int, typer.Option(help="weights each contender goes round; exceed the cache")] = 320,
    memory_mib: Annotated[int, typer.Option(help="most memory that all weights together may take")] = 2048,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write the rows there as well")] = None,
) -> None:
    """Time one token through every shape of a model's layers."""
    if model not in (*SHAPES, "all"):
        raise typer.BadParameter(f"--model is one of {[*SHAPES, 'all']}, got {model!r}")
    if not available_isas():
        raise typer.BadParameter("the CPU extension is not built: there is nothing to measure")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    limit, where = read_bandwidth(), (threads, chosen_isa(), device_name(), commit())
    rows = []
    for family, shapes in SHAPES.items():
        if model not in (family, "all"):
            continue
        for layer, (out, n) in shapes.items():
            found = measure(out, n, rounds, footprint_mib * MIB, memory_mib * MIB)
            median = {name: quantile(times, 0.5) for name, (times, _, _) in found.items()}
            for name, (times, size, copies) in found.items():
                middle = median[name]
                numbers = [round(1e6 * t, 1) for t in (middle, quantile(times, 0.2), quantile(times, 0.8))]
                speed = (round(size / middle / 1e9, 2), round(size / middle / limit, 2))
                ratios = (round(median["bf16"] / middle, 2), round(median["fp32"] / middle, 2))
                mib = size * copies // MIB
                rows.append(Row(family, layer, out, n, name, copies, mib, *numbers, *speed, *ratios, *where))
    show(rows, limit)
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def show(rows: list[Row], limit: float) -> None:
    first = rows[0]
    title = (
        f"{first.device}, {first.threads} thread(s), {first.isa}, commit {first.commit}, reads {limit / 1e9:.1f} GB/s"
    )
    columns = ["layer", "shape", "", "MiB", "median us", "p20", "p80", "GB/s", "of read", "x bf16", "x fp32"]
    table = Table(*columns, title=title)
    for r in rows:
        table.add_row(
            f"{r.model} {r.layer}",
            f"{r.out_features}x{r.in_features}",
            r.contender,
            *(str(v) for v in (r.footprint_mib, r.median_us, r.p20_us, r.p80_us, r.gb_per_s, r.share_of_read)),
            *(f"{v:.2f}" for v in (r.times_bf16, r.times_fp32)),
            end_section=r.contender == "fp32",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    typer.run(main)
