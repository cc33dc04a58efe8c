"""`quantize inspect`: every layer of a packed checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Scheme, bits, bytes and recorded error of every layer of CHECKPOINT."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluation import rates
    from ..formats.config_json import read_json
    from ..formats.native import open_native
    from ..quant.scheme import Scheme
    from ..quant.tensor import stored_bytes
    from .text import size

    source = open_native(checkpoint)
    report = checkpoint / "quantization_report.json"
    errors = {}
    if report.exists():
        errors = {r["parameter"]: r["error"] for r in read_json(report).get("layers", [])}
    layers = []
    for name, entry in source.quantization.tensors.items():
        scheme = Scheme.from_dict(source.quantization.schemes[entry.scheme])
        n = stored_bytes(scheme, tuple(entry.shape))
        weights = 1
        for dimension in entry.shape:
            weights *= dimension
        layers.append(
            {
                "parameter": name,
                "shape": list(entry.shape),
                "scheme": scheme.to_dict(),
                "bits_per_weight": round(8 * n / weights, 6),
                "bytes": n,
                "error": errors.get(name),
            }
        )
    values = {
        "format_version": source.quantization.format_version,
        "bitpalette_version": source.quantization.bitpalette_version,
        "model_bytes": source.size_bytes,
        **rates(source),
        "layers": layers,
    }
    if json_output:
        print(json.dumps(values))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None)
    for column in ("weight", "shape", "scheme", "bits", "bytes", "error"):
        table.add_column(column, overflow="fold", justify="left" if column in ("weight", "scheme") else "right")
    for layer, entry in zip(layers, source.quantization.tensors.values(), strict=True):
        scheme = Scheme.from_dict(source.quantization.schemes[entry.scheme])
        error = "" if layer["error"] is None else f"{layer['error']:.2e}"
        shape = "x".join(map(str, entry.shape))
        figures = (f"{layer['bits_per_weight']:.3f}", f"{layer['bytes']:,}", error)
        table.add_row(str(layer["parameter"]), shape, str(scheme), *figures)
    console.print(table)
    console.print(
        f"{len(layers)} quantized weights, {values['bits_per_weight']:.3f} bits on average, "
        f"{values['file_bits_per_weight']:.3f} over the file of {size(source.size_bytes)}; "
        f"format {values['format_version']}, bitpalette {values['bitpalette_version']}",
        highlight=False,
    )
