"""Bytes that a packed cache allocates, beside those of a 16-bit cache and beside the formula.

    python bench/kv_memory.py [--tokens 8192] [--format k4v4] [--kv-heads 8] [--head-dim 128] [--layers 32]

One layer is filled, token by token at its end, and its tensors counted; layers are alike. Without a number of tokens
given beforehand (`reserve`) pages are allocated a sixteenth at a time; both are shown.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from bitpalette.kernels.kv_kernel import choose
from bitpalette.kernels.kv_rows import KVRows, cache_bytes
from bitpalette.quant.kv_format import KVFormat


def filled(form: KVFormat, kv_heads: int, head_dim: int, tokens: int, reserved: int, alone: int = 100) -> KVRows:
    """A layer of `tokens` tokens, the last `alone` of them one by one."""
    device = torch.device("cpu")
    kernel = choose(form, head_dim, head_dim, device)
    rows = KVRows(form, 1, kv_heads, head_dim, head_dim, torch.bfloat16, device, encoder=kernel)
    rows.reserve(reserved)
    for n in (tokens - alone, *[1] * alone):
        x = torch.randn(1, kv_heads, n, head_dim).bfloat16()
        rows.append(*rows.stored(x, x), np.zeros(1, np.int64))
    assert rows.lengths.tolist() == [tokens]
    return rows


def main(
    tokens: Annotated[list[int], typer.Option()] = [8192, 32768],  # noqa: B006
    form: Annotated[list[str], typer.Option("--format")] = ["k4v4", "k3v3", "k4v2", "k2v2"],  # noqa: B006
    kv_heads: int = 8,
    head_dim: int = 128,
    layers: int = 32,
) -> None:
    table = Table("tokens", "format", "bits an element", "16 bits, MB", "allocated, MB", "smaller", "as it grows")
    for length in tokens:
        for name in form:
            kind = KVFormat.parse(name)
            rows = filled(kind, kv_heads, head_dim, length, length)
            expected = cache_bytes(kind, length, 1, kv_heads, head_dim)
            if rows.nbytes != expected:
                raise SystemExit(f"{name}, {length} tokens: {rows.nbytes} bytes allocated, the formula says {expected}")
            dense = length * kv_heads * 2 * head_dim * 2
            grown = filled(kind, kv_heads, head_dim, length, 0).nbytes
            table.add_row(
                str(length),
                name,
                f"{kind.bits_per_element(head_dim):.2f}",
                f"{layers * dense / 1e6:.1f}",
                f"{layers * rows.nbytes / 1e6:.1f}",
                f"{dense / rows.nbytes:.2f}x",
                f"{dense / grown:.2f}x",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
