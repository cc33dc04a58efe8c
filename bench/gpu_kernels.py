"""Times of the GPU kernels beside cuBLAS and a device copy, against the targets, within a budget of seconds.

    python3 bench/gpu_kernels.py [--budget 200] [--json FILE] [--dry]

Shapes and numbers of tokens are gone through in order of importance until the budget is spent; all formats of one are
in the same rounds (bitpalette/kernel_bench/gpu_rounds.py: CUDA graphs, weights rotated over three times the L2). The
file is written anew after each. Weights are random codes; a result that is not its weight's is not timed and makes the
exit code 1. `bytes` are those of the weight as packed, of x and of y.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parts_alone  # noqa: F401 - before bitpalette
import torch

from bitpalette.kernel_bench.contender import Call, Contender, Expected
from bitpalette.kernel_bench.gpu_contenders import gpu_contender, torch_contender
from bitpalette.kernel_bench.gpu_rounds import Copier, l2_bytes, time_on_gpu
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernel_bench.rounds import Timed, speed_over, spread
from bitpalette.kernels.cuda_tiles import ACTIVATIONS_VARIABLE
from bitpalette.quant.codec import get_codec
from bitpalette.quant.scheme import Scheme

LARGE = [(8192, 8192), (28672, 8192), (28672, 4096)]
SHAPES = [*LARGE, (4096, 4096)]
TOKENS = [1, 16, 64, 8, 32, 128, 256]
ROUNDS = 100
COPIES_BYTES = 4 << 30
DTYPE = torch.float16

# H100 SXM: (least speed-up over cuBLAS fp16, geometric mean of LARGE) by (format, tokens): the targets
TARGETS: dict[tuple[str, int], float] = {
    **{("int4 g128", tokens): 3.0 for tokens in (1, 8, 16)},
    ("int4 g128", 64): 1.8,
    **{(name, t): 3.0 for name in ("int4 channel a8", "int4 progressive a8") for t in (1, 8, 16, 32)},
    ("lut3 g128", 1): 3.5,
    ("trellis 3", 1): 3.0,
    ("trellis 2", 1): 3.5,
    ("trellis 3 int8", 1): 3.0,
    ("trellis 2 int8", 1): 3.5,
}


@dataclass(frozen=True)
class Entry:
    """A format as it is timed. form: of activations; most: no more tokens than that; tolerance: of the check."""

    name: str
    scheme: dict[str, Any]
    form: str = "16bit"
    kernel: str = "cuda"
    most: int = 1 << 20
    only: tuple[int, ...] = ()

    def runs_with(self, tokens: int) -> bool:
        return tokens <= self.most and (not self.only or tokens in self.only)


INT4 = {"codec": "int", "bits": 4, "group_size": 128}
LUT4 = {"codec": "lut", "entries": 16, "group_size": 128}
ENTRIES = [
    Entry("int4 g128", INT4),
    Entry("int4 channel a8", {"codec": "int", "bits": 4}, "int8"),
    Entry("int4 progressive a8", {**INT4, "progressive": True}, "int8"),
    Entry("lut4 g128", LUT4),
    Entry("lut3 g128", {"codec": "lut", "entries": 8, "group_size": 128}),
    Entry("int2 g128", {"codec": "int", "bits": 2, "group_size": 128}),
    *(Entry(f"trellis {rate:g}", {"codec": "trellis", "rate": rate}) for rate in (2.0, 2.5, 3.0, 4.0)),
    *(
        Entry(f"trellis {rate:g} {form}", {"codec": "trellis", "rate": rate}, form, most=2)
        for rate in (2.0, 2.5, 3.0, 4.0)
        for form in ("int8", "exact")
    ),
    Entry("e4m3", {"codec": "float", "element": "e4m3"}),
    Entry("int4 g128 triton", INT4, kernel="triton", only=(1, 16, 64)),
    Entry("lut4 g128 triton", LUT4, kernel="triton", only=(1, 16)),
]
CUBLAS = "torch.float16"
INT8_TOLERANCE, TOLERANCE = 0.03, 3e-3


class Weights:
    """The contenders of one shape, made once."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(shape[0] + shape[1])
        self.x = torch.randn(max(TOKENS), shape[1], generator=self.generator, device=device).to(DTYPE)
        self.cublas = (torch_contender(CUBLAS, shape, self.generator), list[Call]())
        self.by_entry = {entry: (self._contender(entry), list[Call]()) for entry in ENTRIES}

    def _contender(self, entry: Entry) -> Contender:
        qt = random_weight(Scheme.from_dict(entry.scheme), self.shape, self.generator)
        w = get_codec(qt.scheme.codec).decode(qt)
        z = self.x.float()
        scale = z.norm(dim=1) * float(w.norm()) / math.sqrt(self.shape[1])
        rounded = entry.form == "int8" or bool(entry.scheme.get("progressive"))
        expected = Expected(z @ w.T, scale, INT8_TOLERANCE if rounded else TOLERANCE)
        made = gpu_contender(entry.kernel, qt, DTYPE, expected)
        return Contender(**{**vars(made), "first": _in_form(made.first, entry), "new_copy": _copier(made, entry)})


def _in_form(call: Call, entry: Entry) -> Call:
    """The form of activations is read at a weight's first call."""

    def run(x: Any) -> Any:
        os.environ[ACTIVATIONS_VARIABLE] = entry.form
        return call(x)

    return run


def _copier(made: Contender, entry: Entry) -> Any:
    return lambda: _in_form(made.new_copy(), entry)


def cells() -> Iterator[tuple[tuple[int, int], int]]:
    """(shape, tokens): the most important numbers of tokens on the large shapes first."""
    for tokens in TOKENS:
        yield from ((shape, tokens) for shape in LARGE)
        yield (4096, 4096), tokens


def measure(budget: float, path: Path | None, device: torch.device) -> dict[str, Any]:
    os.environ.setdefault("BITPALETTE_TRITON_TUNE", "0")
    begun = time.monotonic()
    result: dict[str, Any] = {"about": about(device), "targets": [], "cells": [], "left_out": [], "seconds": 0.0}
    weights: dict[tuple[int, int], Weights] = {}
    copier = Copier(device)
    slowest = 0.0  # of a shape and number of tokens, its first time apart
    for shape, tokens in cells():
        spent = time.monotonic() - begun
        if spent + slowest > budget:
            result["left_out"].append([*shape, tokens])
            continue
        if shape not in weights:
            weights[shape] = Weights(shape, device)
        started = time.monotonic()
        result["cells"] += measure_cell(weights[shape], tokens, copier)
        slowest = max(slowest, time.monotonic() - started)
        result["seconds"] = round(time.monotonic() - begun, 1)
        result["targets"] = against_targets(result["cells"])
        result["wrong"] = [f"{name_of(c)}: {c['wrong']}" for c in result["cells"] if c["wrong"]]
        save(path, result)
    return result


def measure_cell(weights: Weights, tokens: int, copier: Copier) -> list[dict[str, Any]]:
    here = [entry for entry in ENTRIES if entry.runs_with(tokens)]
    taking_part = [weights.cublas, *(weights.by_entry[entry] for entry in here)]
    timed = time_on_gpu(taking_part, weights.x[:tokens], rounds=ROUNDS, memory=COPIES_BYTES, copier=copier)
    names = [CUBLAS, *(entry.name for entry in here)]
    return [cell(name, weights.shape, tokens, t, timed[0]) for name, t in zip(names, timed, strict=True)]


def cell(name: str, shape: tuple[int, int], tokens: int, timed: Timed, cublas: Timed) -> dict[str, Any]:
    out, n = shape
    row: dict[str, Any] = {"format": name, "shape": [out, n], "tokens": tokens}
    row |= {"wrong": timed.wrong, "error": timed.error}
    if timed.wrong:
        return row
    time_ = spread(list(timed.seconds.values()))
    copy = timed.read_bytes / spread(list(timed.read_seconds.values())).median
    nbytes = timed.contender.nbytes + 2 * tokens * (out + n)
    over = speed_over(timed, cublas)
    assert over is not None  # all take part in every round
    return row | {
        "us": round(1e6 * time_.median, 3),
        "p20": round(1e6 * time_.p20, 3),
        "p80": round(1e6 * time_.p80, 3),
        "bytes": nbytes,
        "gb_per_s": round(nbytes / time_.median / 1e9, 1),
        "copy_gb_per_s": round(copy / 1e9, 1),
        "share_of_copy": round(nbytes / time_.median / copy, 4),
        "x_cublas": round(over.median, 4),
        "x_cublas_p20": round(over.p20, 4),
        "x_cublas_p80": round(over.p80, 4),
        "footprint": timed.footprint,
    }


def against_targets(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each target: the geometric mean over the large shapes that were measured, and how many they are."""
    lines = []
    for (name, tokens), wanted in TARGETS.items():
        of_cell = [
            c["x_cublas"]
            for c in found
            if c["format"] == name and c["tokens"] == tokens and tuple(c["shape"]) in LARGE and not c["wrong"]
        ]
        mean = math.exp(sum(map(math.log, of_cell)) / len(of_cell)) if of_cell else None
        lines.append(
            {
                "format": name,
                "tokens": tokens,
                "target": wanted,
                "x_cublas": None if mean is None else round(mean, 3),
                "shapes": len(of_cell),
                "met": mean is not None and mean >= wanted and len(of_cell) == len(LARGE),
            }
        )
    return lines


def about(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    from gpu_about import describe

    found = describe()
    if device.type == "cuda":
        found["l2_bytes"] = l2_bytes(device)
    return found | {"rounds": ROUNDS, "dtype": str(DTYPE)}


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def name_of(c: dict[str, Any]) -> str:
    return f"{c['format']} {c['shape'][0]}x{c['shape'][1]} M={c['tokens']}"


def short(c: dict[str, Any] | None) -> str:
    return "-" if c is None or c["wrong"] else f"{c['us']:.1f}|{c['x_cublas']:.2f}|{c['share_of_copy']:.0%}"


def print_tables(result: dict[str, Any]) -> None:
    found = {(c["format"], tuple(c["shape"]), c["tokens"]): c for c in result["cells"]}
    for shape in SHAPES:
        counts = [tokens for tokens in sorted(TOKENS) if (CUBLAS, shape, tokens) in found]
        if not counts:
            continue
        print(f"\n{shape[0]} x {shape[1]}: us | times cuBLAS | share of copy, by tokens {counts}")
        for name in [CUBLAS, *(entry.name for entry in ENTRIES)]:
            row = [found.get((name, shape, tokens)) for tokens in counts]
            print(f"  {name:22s}" + " ".join(f"{short(c):>17s}" for c in row))
    print("\ntargets (geometric mean of the large shapes)")
    for line in result["targets"]:
        mean = "not measured" if line["x_cublas"] is None else f"{line['x_cublas']:.2f}"
        met = "ok" if line["met"] else ""
        print(f"  {line['format']:22s} M={line['tokens']:<4d} {mean:>12s} of {line['target']:.1f} {met}")
    for text in result.get("wrong", ()):
        print(f"WRONG {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true", help="list what would be measured, without a GPU")
    given = parser.parse_args()
    if given.dry:
        for entry, shape in itertools.product(ENTRIES, SHAPES):
            Scheme.from_dict(entry.scheme).check_shape(shape)
        print(f"{len(list(cells()))} shapes and numbers of tokens, {len(ENTRIES)} formats, {len(TARGETS)} targets")
        save(given.json, {"about": about(torch.device("cpu")), "cells": [], "targets": against_targets([])})
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu_kernels.py: torch sees no CUDA device; --dry lists what it would measure", file=sys.stderr)
        return 2
    result = measure(given.budget, given.json, torch.device("cuda", 0))
    result["gpu_after"] = about(torch.device("cuda", 0)).get("gpu")
    save(given.json, result)
    print_tables(result)
    return int(bool(result.get("wrong")) or not result["cells"])


if __name__ == "__main__":
    sys.exit(main())
