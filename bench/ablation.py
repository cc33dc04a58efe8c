"""What each part of the trellis recipe is worth on a real model: KL divergence with one part changed at a time.

    python bench/ablation.py MODEL --data DIR [--rate 3] [--only NAME ...] [--out results.json]

DIR holds valid.txt (calibration) and test.txt (evaluation). Statistics are those of the original model, taken once for
all rows. Some rows are of things that the product does not offer (rotation in blocks, a scale for each group of
columns), so weights are coded here by the product's own functions and decoded into the original model's layers.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bitpalette.calibrate.collect import collecting, finished
from bitpalette.calibrate.evaluate import chunks_of, evaluate
from bitpalette.calibrate.structure import decoder_blocks, quantizable
from bitpalette.calibrate.text import read_text
from bitpalette.calibrate.whole import load_model, load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.quant.codec import get_codec
from bitpalette.quant.factor import inverse_factor
from bitpalette.quant.hartley import hartley_hadamard
from bitpalette.quant.ldlq import feed_back
from bitpalette.quant.native import chosen_isa
from bitpalette.quant.rotate import random_signs, sign_vector
from bitpalette.quant.stats import Stats
from bitpalette.quant.trellis import TrellisGrid, TrellisScheme


@dataclass(frozen=True)
class Variant:
    """rotation: "full" (Hartley x Hadamard), "blocks" of 64 (Hadamard), "none". group: columns of a scale, 0: all."""

    rotation: str = "full"
    feedback: bool = True
    order: bool = True
    group: int = 0
    window: int = 12


VARIANTS = {
    "all parts, L = 12": Variant(),
    "no rotation": Variant(rotation="none"),
    "Hadamard in blocks of 64": Variant(rotation="blocks"),
    "no feedback": Variant(feedback=False),
    "feedback in natural order": Variant(order=False),
    "a scale for 64 columns": Variant(group=64),
    "L = 14": Variant(window=14),
    "L = 16": Variant(window=16),
}


class GroupGrid(TrellisGrid):
    """The product's grid with a scale for every group of columns."""

    group = 64

    def fit(self, w: Tensor, importance: Tensor | None = None) -> None:
        self.groups = []
        for part in w.split(self.group, 1):
            super().fit(part)
            self.groups.append(self.scale)

    def nearest(self, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        self.scale = self.groups[int(columns[0]) // self.group]
        return super().nearest(w, columns)


def rotated(rotation: str, n: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(forwards, backwards) along the last dimension."""
    if rotation == "none":
        return (lambda x: x), (lambda x: x)
    signs = sign_vector(random_signs(0, n), n)

    def turn(x: Tensor) -> Tensor:
        if rotation == "full":
            return hartley_hadamard(x)
        return hartley_hadamard(x.reshape(-1, n // 64, 64)).reshape(x.shape)

    return (lambda x: turn(x * signs)), (lambda x: turn(x) * signs)


def coded(w: Tensor, stats: Stats, v: Variant, rate: float) -> Tensor:
    """w [out, in] as this variant decodes it."""
    there, back = rotated(v.rotation, w.shape[1])
    h = there(there(stats.hessian).T)
    h = (h + h.T) / 2
    order = torch.argsort(h.diagonal(), descending=True) if v.order else torch.arange(w.shape[1])
    z, h = there(w)[:, order].contiguous(), h[order][:, order]
    scheme = TrellisScheme(rate, v.window)
    shape = (w.shape[0], w.shape[1])
    grid = GroupGrid(scheme, shape, w.device) if v.group else get_codec("trellis").grid(scheme, shape, w.device)
    grid.fit(z)
    if v.feedback:
        q = feed_back(z, grid, scheme.block, inverse_factor(h))[1]
    else:
        blocks = torch.arange(w.shape[1]).split(64)
        q = torch.cat([grid.nearest(z[:, b], b)[1] for b in blocks], 1)
    out = torch.empty_like(q)
    out[:, order] = q
    return back(out)


def main(
    model: str,
    data: Annotated[Path, typer.Option(help="Folder with valid.txt and test.txt.")],
    rate: Annotated[float, typer.Option(help="Bits a weight.")] = 3.0,
    only: Annotated[list[str] | None, typer.Option(help="Variants to run; all if none.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 65536,
    chunks: Annotated[int, typer.Option(help="Of 512 tokens, evaluated on.")] = 32,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    source = open_source(model)
    tokenizer = load_tokenizer(source)
    reference, student = (load_model(source, torch.float32) for _ in range(2))
    weights = quantizable(reference)
    blocks = tuple(name + "." for name, _ in decoder_blocks(reference))
    inside = {k: w for k, w in weights.items() if k.startswith(blocks) and w.kind == "linear"}
    with collecting(reference, inside) as moments, torch.no_grad():
        for batch in chunks_of(tokenizer, read_text(str(data / "valid.txt")), 512, tokens // 512).split(4):
            reference.model(input_ids=batch, use_cache=False)
    stats: Any = finished(moments)
    test = chunks_of(tokenizer, read_text(str(data / "test.txt")), 512, chunks)
    rows: dict[str, Any] = {}
    print("| variant | KL, nats/token | perplexity | top-1 % | seconds to quantize |\n|---|---|---|---|---|")
    for name in only or VARIANTS:
        start = time.monotonic()
        for parameter in inside:
            w = reference.get_parameter(parameter).detach()
            student.get_parameter(parameter).data.copy_(coded(w, stats[parameter], VARIANTS[name], rate))
        seconds = time.monotonic() - start
        r = evaluate(student, test, reference)
        rows[name] = {
            "kl_divergence": r.kl_divergence,
            "kl_standard_error": r.kl_standard_error,
            "perplexity": r.perplexity,
            "top1_agreement": r.top1_agreement,
            "seconds": round(seconds, 1),
        }
        print(
            f"| {name} | {r.kl_divergence:.4f} ± {r.kl_standard_error:.4f} | {r.perplexity:.2f} "
            f"| {100 * (r.top1_agreement or 0):.1f} | {seconds:.0f} |",
            flush=True,
        )
        if out is not None:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
            about = {
                "commit": commit.stdout.strip(),
                "machine": platform.machine(),
                "isa": chosen_isa(),
                "cores": os.cpu_count(),
                "rate": rate,
                "tokens": tokens,
                "chunks": chunks,
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("done", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
