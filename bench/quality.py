"""Quality of every recipe on a real model: compile, evaluate against the original, print the README's table.

    python bench/quality.py MODEL --data DIR [--only NAME ...] [--out results.json]

DIR holds valid.txt (calibration) and test.txt (evaluation). Every row is two commands that a user could run, and the
JSON keeps them beside their figures and the commit. A file that is there already keeps its other rows.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

COMMON = ["--head-bits", "16", "--embed-bits", "16"]
INT4 = ["--codec", "int", "--bits", "4", "--group-size", "64"]
RATES = (4.0, 3.5, 3.0, 2.5, 2.0)
RECIPES: dict[str, list[str]] = {
    "gptq + rotation": [*INT4, "--solver", "gptq", "--rotate"],
    "gptq": [*INT4, "--solver", "gptq", "--no-rotate"],
    "awq": [*INT4, "--solver", "awq", "--no-rotate"],
    "awq+gptq": [*INT4, "--solver", "awq+gptq", "--no-rotate"],
    "rtn": [*INT4, "--solver", "rtn", "--no-rotate"],
    "rtn + rotation": [*INT4, "--solver", "rtn", "--rotate"],
    "gptq + rotation + fold": [*INT4, "--solver", "gptq", "--rotate", "--fold"],
    "gptq + rotation, 3 bits": ["--codec", "int", "--bits", "3", "--group-size", "64", "--solver", "gptq", "--rotate"],
    **{f"trellis {rate:g}": ["--codec", "trellis", "--bits", f"{rate:g}"] for rate in RATES},
    **{f"trellis {rate:g}, best": ["--codec", "trellis", "--bits", f"{rate:g}", "--effort", "best"] for rate in RATES},
    "trellis 3.5, head and embeddings 4": ["--codec", "trellis", "--bits", "3.5", "--head-bits", "4"],
}
QUANTIZE = [sys.executable, "-m", "bitpalette"]


def call(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([*QUANTIZE, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"quantize {' '.join(arguments)}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(model: str, data: Path, recipe: list[str], tokens: int, stats: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "packed")
        calibration = ["--calib", str(data / "valid.txt"), "--calib-tokens", str(tokens)]
        if stats is not None:
            calibration += ["--stats", str(stats)]
        ran = call(["run", model, out, *([] if "--head-bits" in recipe else COMMON), *recipe, *calibration])
        text = ["--text", str(data / "test.txt"), "--seq-len", "512", "--chunks", "32"]
        evaluated = call(["eval", out, "--against", model, *text])
    return {
        "recipe": recipe,
        "shared_stats": stats is not None,
        "file_bytes": ran["file_bytes"],
        "run_seconds": ran["seconds"],
        "peak_memory_bytes": ran["peak_memory_bytes"],
        **evaluated,
    }


def main(
    model: str,
    data: Annotated[Path, typer.Option(help="Folder with valid.txt and test.txt.")],
    only: Annotated[list[str] | None, typer.Option(help="Recipes to run; all if none.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 65536,
    stats: Annotated[
        Path | None, typer.Option(help="Folder of statistics that all recipes share, of the original model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    rows: dict[str, Any] = json.loads(out.read_text())["rows"] if out is not None and out.exists() else {}
    for name in only or RECIPES:
        rows[name] = {"commit": commit, **measure(model, data, RECIPES[name], tokens, stats)}
        print(f"done: {name}: {rows[name]['kl_divergence']:.4f}", file=sys.stderr, flush=True)
        if out is not None:
            about = {"machine": platform.machine(), "cores": os.cpu_count(), "common": COMMON, "tokens": tokens}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("| recipe | bits | KL, nats/token | perplexity | top-1 % | seconds |")
    print("|---|---|---|---|---|---|")
    for name, r in rows.items():
        print(
            f"| {name} | {r['bits_per_weight']:.3f} | {r['kl_divergence']:.4f} ± {r['kl_standard_error']:.4f} "
            f"| {r['perplexity']:.2f} | {100 * r['top1_agreement']:.1f} | {r['run_seconds']:.0f} |"
        )


if __name__ == "__main__":
    typer.run(main)
