"""Attention of one or a few new tokens over a cache: packed pages against torch's attention over a bfloat16 cache.

    python bench/kv_attention.py [--tokens 8192] [--format k4v4] [--shape Llama-8B] [--new 1] [--threads 1] \\
        [--rounds 15] [--json bench/results/kv-attention.json]

Both take turns, round by round; medians with p20 and p80 in microseconds of a layer, the packed cache's bytes a second,
and how many times as fast it is. With one thread the clock is the processor time of the process, which is its wall time
without other processes; with more it is wall time. The packed cache's time has the rotations of query and output in it,
and the bookkeeping of a call, as a model's step has.
With several layers (--layers), each round attends over all of them in turn: what a model's memory is like.

Torch takes the heads of a kv head as so many queries of one head, 9 times as fast here as its own `enable_gqa`, and
several new tokens without the mask among them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bitpalette.kernels.kv_cpu import KVCpu
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.provenance import commit, processor
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.native import chosen_isa

SHAPES = {"Llama-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
"""{name: (query heads, kv heads, head_dim)}"""


def packed_cache(form: KVFormat, kv_heads: int, head_dim: int, tokens: int) -> KVRows:
    """Random codes: what they are changes no time."""
    rows = KVRows(form, 1, kv_heads, head_dim, head_dim, torch.bfloat16, torch.device("cpu"), encoder=KVCpu())
    rows.reserve(tokens)
    few = torch.randn(1, tokens, kv_heads, head_dim).bfloat16()
    rows.append(few, few, np.zeros(1, np.int64))
    return rows


def dense_cache(kv_heads: int, head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(1, kv_heads, tokens, head_dim).bfloat16() for _ in range(2))
    return k, v


@dataclasses.dataclass(frozen=True)
class Spread:
    """Microseconds of a layer."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(times: list[float]) -> Spread:
        low, *_, high = statistics.quantiles(times, n=5)
        return Spread(round(statistics.median(times), 1), round(low, 1), round(high, 1))

    def __str__(self) -> str:
        return f"{self.median:9.0f} ({self.p20:.0f} .. {self.p80:.0f})"


@dataclasses.dataclass(frozen=True)
class Row:
    """times_as_fast: of the medians. bytes: of a layer's pages, codes and gains."""

    shape: str
    tokens: int
    format: str
    new_tokens: int
    isa: str
    threads: int
    clock: str
    layers: int
    rounds: int
    packed: Spread
    torch_bfloat16: Spread
    times_as_fast: float
    bytes: int
    device: str
    commit: str

    def __str__(self) -> str:
        rate = self.bytes / self.packed.median / 1e3
        name = f"{self.shape:13} {self.tokens:6} {self.format} x{self.new_tokens}"
        return f"{name}: {self.packed}, {rate:5.1f} GB/s; torch {self.torch_bfloat16}: {self.times_as_fast:.2f}x"


def measure(
    shape: str, tokens: int, form: str, new: int, threads: int, rounds: int, layers: int, exact: bool | None
) -> Row:
    heads, kv_heads, head_dim = SHAPES[shape]
    kernel, q = KVCpu(), torch.randn(1, heads, new, head_dim).bfloat16()
    dense = [dense_cache(kv_heads, head_dim, tokens) for _ in range(layers)]
    caches = [packed_cache(KVFormat.parse(form), kv_heads, head_dim, tokens) for _ in range(layers)]

    no_padding = np.zeros(1, np.int64)

    def ours() -> None:
        for rows in caches:
            kernel.attention(q, rows, None, no_padding, head_dim**-0.5, exact=exact)

    def theirs() -> None:
        for k, v in dense:
            F.scaled_dot_product_attention(q.view(1, kv_heads, -1, head_dim), k, v)

    clock = time.process_time if threads == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for r in range(rounds + 2):
        for call, kept in zip((ours, theirs), times, strict=True):
            took = timed(call, clock) / layers
            if r >= 2:
                kept.append(took)
    packed, torch_bfloat16 = Spread.of(times[0]), Spread.of(times[1])
    pool = caches[0].pool
    return Row(
        shape,
        tokens,
        form,
        new,
        chosen_isa(),
        threads,
        "process" if threads == 1 else "wall",
        layers,
        rounds,
        packed,
        torch_bfloat16,
        round(torch_bfloat16.median / packed.median, 3),
        pool.nbytes,
        processor(),
        commit() or "installed",
    )


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return (clock() - start) * 1e6


def main(
    tokens: Annotated[list[int], typer.Option()] = [8192, 32768],  # noqa: B006
    form: Annotated[list[str], typer.Option("--format")] = ["k4v4", "k3v3", "k2v2"],  # noqa: B006
    shape: Annotated[list[str], typer.Option()] = list(SHAPES),  # noqa: B006
    new: Annotated[list[int], typer.Option(help="new tokens, 1 to 16")] = [1],  # noqa: B006
    threads: Annotated[list[int], typer.Option()] = [1],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    exact: Annotated[bool | None, typer.Option(help="queries in 16 bits; unset: where keys have 8")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows there as well")] = None,
) -> None:
    rows = []
    print(f"{chosen_isa()}, {layers} layers, microseconds a layer: median (p20 .. p80)")
    for count in threads:
        torch.set_num_threads(count)
        for name in shape:
            for length in tokens:
                for each in form:
                    for n in new:
                        rows.append(measure(name, length, each, n, count, rounds, layers, exact))
                        print(f"{count} threads, {rows[-1]}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
