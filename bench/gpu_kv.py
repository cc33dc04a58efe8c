"""Times of attention over the packed cache beside torch's over a 16-bit one, on a GPU, against the targets.

    python3 bench/gpu_kv.py [--budget 60] [--json FILE] [--dry]

One new token, heads of Llama-8B (32 query heads, 8 kv heads, head_dim 128). Every contender is a CUDA graph of many
calls that go round copies of the cache beyond three times the L2; medians with p20 and p80 of 50 replays, one contender
after another, because their copies do not fit side by side. The packed cache's time has the rotations of query and
output in it. Torch is the faster of its `enable_gqa` and the heads of a kv head as so many queries of one head.
`append` is that of a token's key and value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parts_alone  # noqa: F401 - before bitpalette
import torch
import torch.nn.functional as F
from gpu_about import describe
from torch import Tensor

from bitpalette.kernel_bench.gpu_rounds import Graph, capture, copies_wanted, l2_bytes
from bitpalette.kernels.kv_cuda import KVCuda
from bitpalette.kernels.kv_parts import Dense, Pages
from bitpalette.quant.kv_format import PAGE, KVFormat
from bitpalette.quant.kv_token import packed_bytes

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SINKS, WINDOW = 4, 64
ROUNDS = 50
MEMORY = 24 << 30
"""Bytes that one contender's copies may take."""

FORMATS = ("k4v4", "k3v3", "k4v2", "k2v2", "k8v8")
CELLS = ((1, 32768), (16, 8192), (1, 131072), (1, 8192), (16, 32768), (16, 131072))
"""(batch, tokens), the most important first."""

# H100: (batch, tokens) -> least speed-up over torch with a 16-bit cache
TARGETS: dict[str, dict[tuple[int, int], float]] = {
    "k4v4": {
        (1, 8192): 1.0,
        (1, 32768): 1.8,
        (1, 131072): 2.8,
        (16, 8192): 2.3,
        (16, 32768): 2.8,
        (16, 131072): 2.8,
    },
    "k2v2": {(1, 131072): 4.0, (16, 32768): 4.0, (16, 131072): 4.0},
}
KERNEL = KVCuda()
Call = Callable[[Tensor], Any]


def packed_calls(form: KVFormat, batch: int, tokens: int, device: torch.device) -> tuple[list[Call], int]:
    """([attention of q, append of x [batch, KV_HEADS, HEAD_DIM]], bytes of the pages). Random codes: what they are
    changes no time."""
    inside = tokens - SINKS - WINDOW
    count = -(-inside // PAGE)
    codes = [
        torch.randint(
            0,
            256,
            (batch * count, KV_HEADS, PAGE, packed_bytes(HEAD_DIM, bits)),
            dtype=torch.uint8,
            device=device,
        )
        for bits in (form.bits_k, form.bits_v)
    ]
    gains = [torch.rand(batch * count, KV_HEADS, PAGE, device=device).add_(0.5).mul_(0.2).half() for _ in range(2)]
    table = torch.randperm(batch * count, device=device).int().view(batch, count)
    lengths = torch.full((batch,), inside, dtype=torch.int32, device=device)
    pages = Pages(codes[0], gains[0], codes[1], gains[1], form.bits_k, form.bits_v, table, lengths)

    def dense(n: int) -> Dense:
        k, v = (torch.randn(batch, n, KV_HEADS, HEAD_DIM, device=device).half() for _ in range(2))
        return Dense(k, v, torch.full((batch,), n, dtype=torch.int32, device=device))

    sinks, window, fresh = dense(SINKS), dense(WINDOW - 1), dense(1)
    slots = table[:, -1].long() * PAGE + PAGE - 1

    def attend(q: Tensor) -> Tensor:
        scale = HEAD_DIM**-0.5
        return KERNEL.attend(q, pages, sinks, window, fresh, scale=scale, out_dtype=q.dtype, rotate=True)

    def append(x: Tensor) -> None:
        KERNEL.append(x, slots, codes[0], gains[0], form.bits_k, True, rotated=False)
        KERNEL.append(x, slots, codes[1], gains[1], form.bits_v, False, rotated=False)

    return [attend, append], sum(t.numel() * t.element_size() for t in (*codes, *gains))


def torch_calls(batch: int, tokens: int, device: torch.device) -> tuple[list[Call], int]:
    k, v = (torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, device=device, dtype=torch.float16) for _ in range(2))

    def grouped(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def folded(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.view(batch, KV_HEADS, -1, HEAD_DIM), k, v)

    return [grouped, folded], 2 * k.numel() * k.element_size()


def copies(make: Callable[[], tuple[list[Call], int]], device: torch.device) -> tuple[list[list[Call]], int]:
    """(the calls of each of enough copies of a cache, bytes of one)."""
    first, nbytes = make()
    count = copies_wanted(nbytes, l2_bytes(device), MEMORY)
    return [first, *(make()[0] for _ in range(count - 1))], nbytes


def rounds(graphs: dict[str, Graph], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of a call; several graphs take turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for r in range(-3, ROUNDS):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize(device)
            if r >= 0:
                found[name].append(1e3 * start.elapsed_time(stop) / graph.launches)
    return found


@torch.inference_mode()
def measure_cell(batch: int, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    q = torch.randn(batch, HEADS, 1, HEAD_DIM, device=device, dtype=torch.float16)
    x = torch.randn(batch, KV_HEADS, HEAD_DIM, device=device, dtype=torch.float16)
    nbytes, times = {}, {}
    dense, nbytes["torch"] = copies(lambda: torch_calls(batch, tokens, device), device)
    for i, name in enumerate(("torch grouped", "torch folded")):
        times |= rounds({name: capture([calls[i] for calls in dense], q)}, device)
    del dense
    torch.cuda.empty_cache()
    for text in FORMATS:
        form = KVFormat.parse(text)
        packed, nbytes[text] = copies(lambda form=form: packed_calls(form, batch, tokens, device), device)
        graphs = {
            name: capture([calls[i] for calls in packed], y) for i, name, y in ((0, text, q), (1, f"append {text}", x))
        }
        times |= rounds(graphs, device)
        del graphs, packed
        torch.cuda.empty_cache()
    median = {name: statistics.median(values) for name, values in times.items()}
    torch_us = min(median["torch grouped"], median["torch folded"])
    rows = []
    for name, values in times.items():
        key = "torch" if name.startswith("torch") else name.removeprefix("append ")
        cuts = statistics.quantiles(values, n=5)
        row = {"name": name, "batch": batch, "tokens": tokens, "us": round(median[name], 2)}
        row |= {"p20": round(cuts[0], 2), "p80": round(cuts[-1], 2)}
        if not name.startswith("append"):
            row |= {"gb_per_s": round(nbytes[key] / median[name] / 1e3, 1), "bytes": nbytes[key]}
            row |= {"x_torch": round(torch_us / median[name], 3)}
        rows.append(row)
    return rows


def against_targets(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_cell = {(r["name"], r["batch"], r["tokens"]): r for r in found}
    lines: list[dict[str, Any]] = []
    for name, cells in TARGETS.items():
        for (batch, tokens), wanted in cells.items():
            row = by_cell.get((name, batch, tokens))
            got = None if row is None else row["x_torch"]
            lines.append({"name": name, "batch": batch, "tokens": tokens, "target": wanted, "x_torch": got})
            lines[-1]["met"] = got is not None and got >= wanted
    return lines


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true", help="list what would be measured, without a GPU")
    given = parser.parse_args()
    result: dict[str, Any] = {"about": describe(), "cells": [], "left_out": [], "targets": against_targets([])}
    if given.dry:
        print(f"{len(CELLS)} caches, {len(FORMATS)} formats, {len(result['targets'])} targets")
        save(given.json, result)
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu_kv.py: torch sees no CUDA device; --dry lists what it would measure", file=sys.stderr)
        return 2
    device, begun, slowest = torch.device("cuda", 0), time.monotonic(), 0.0
    for batch, tokens in CELLS:
        started = time.monotonic()
        if started - begun + slowest > given.budget:
            result["left_out"].append([batch, tokens])
            continue
        result["cells"] += measure_cell(batch, tokens, device)
        slowest = max(slowest, time.monotonic() - started)
        result["targets"] = against_targets(result["cells"])
        save(given.json, result)
    for row in result["cells"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    for line in result["targets"]:
        print(f"{line['name']} batch {line['batch']} {line['tokens']} tokens: {line['x_torch']} of {line['target']}")
    return int(not result["cells"])


if __name__ == "__main__":
    sys.exit(main())
