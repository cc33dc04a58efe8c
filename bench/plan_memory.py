"""What `bitpalette/plan_memory.py` promises beside what a process of its own uses; exit 1 where they are 5 % apart.

    python bench/plan_memory.py CHECKPOINT [CHECKPOINT ...] --context 2048 [--context 8192] [--kv 16] [--kv k4v4]

Each measurement is a process that loads the packed checkpoint, and then generates the last tokens of a context after a
prompt that fills the rest: its VmHWM from after loading to the end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from bitpalette.formats.native import NativeConfig
from bitpalette.kv_load import plan_from_spec
from bitpalette.plan_base import peak_after
from bitpalette.plan_memory import memory_of

NEW = 8
ALLOWED = 0.05


def promised(checkpoint: Path, kv: str, context: int, chunk: int | None) -> Any:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    raw = config.quantization_config
    native = NativeConfig.parse(raw if isinstance(raw, dict) else raw.to_dict(), "config.json")
    schemes = {name: native.scheme_of(name) for name in native.tensors}
    plan = plan_from_spec(kv, checkpoint, config)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    return memory_of(model, schemes, plan, context, chunk=chunk)


def measured(checkpoint: Path, kv: str, context: int, chunk: int | None) -> int:
    command = [sys.executable, __file__, "--child", str(checkpoint), "--kv", kv, "--context", str(context)]
    command += [] if chunk is None else ["--chunk", str(chunk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkpoint}: the measurement failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return int(done.stdout.split()[-1])


def fill(checkpoint: Path, kv: str, context: int, chunk: int | None) -> int:
    import bitpalette

    model = bitpalette.load(checkpoint, dtype=torch.bfloat16, kv=kv)
    prompt = torch.randint(100, 200, (1, context - NEW))
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    return peak_after(lambda: bitpalette.generate(model, prompt, max_new_tokens=NEW, min_new_tokens=NEW, **options))


def main(
    checkpoints: list[Path],
    context: Annotated[list[int], typer.Option(min=NEW + 1)] = [2048],  # noqa: B006
    kv: Annotated[list[str], typer.Option()] = ["16", "k4v4"],  # noqa: B006
    chunk: Annotated[
        int | None, typer.Option(help="tokens that the prompt is read by; all at once if not given")
    ] = None,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Measure."""
    if child:
        print(fill(checkpoints[0], kv[0], context[0], chunk))
        return
    parts = ("base", "linears", "head", "embeddings", "other", "cache", "workspace")
    table = Table("checkpoint", "cache", "context", *parts, "promised", "measured", "off", title="MiB, one row")
    worst = 0.0
    for checkpoint in checkpoints:
        for spec in kv:
            for tokens in context:
                memory = promised(checkpoint, spec, tokens, chunk)
                used = measured(checkpoint, spec, tokens, chunk)
                off = memory.total / used - 1
                worst = max(worst, abs(off))
                values = [f"{n / 2**20:.1f}" for n in (*(getattr(memory, p) for p in parts), memory.total, used)]
                table.add_row(checkpoint.name, spec, str(tokens), *values, f"{100 * off:+.1f} %")
    Console(width=150).print(table)
    if not worst <= ALLOWED:
        print(f"a promise is {100 * worst:.1f} % off, {100 * ALLOWED:g} % are allowed", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
