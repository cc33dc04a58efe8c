"""`quantize eval`: perplexity, and distance from the original."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

KEYS = (
    "perplexity",
    "reference_perplexity",
    "kl_divergence",
    "kl_standard_error",
    "top1_agreement",
    "activations",
    "tokens",
    "bits_per_weight",
    "file_bits_per_weight",
    "model_bytes",
    "seconds",
)


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint, or any model.")],
    against: Annotated[str | None, typer.Option(help="The original, for KL divergence and agreement.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text to evaluate on.", show_default="docstrings of Python's library")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of one chunk.")] = 512,
    chunks: Annotated[int, typer.Option(help="Chunks to evaluate.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of activations and unquantized weights.")] = "float32",
    activations: Annotated[
        str | None,
        typer.Option(
            help="What CPU kernels multiply: int8, as generation does, exact (15 bits) or float32.",
            show_default="BITPALETTE_CPU_ACTIVATIONS, else exact: the weights alone",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of CHECKPOINT and, against the original, the mean KL divergence (nats a token) and top-1 agreement."""
    from rich.console import Console
    from rich.table import Table

    from ..calibrate.plan import PlanError
    from ..evaluation import compare
    from ..kernels.activation_form import ACTIVATIONS_VARIABLE, EXACT, FORMS, layers_made_with

    if dtype not in ("float32", "bfloat16", "float16"):
        raise PlanError(f"--dtype is float32, bfloat16 or float16; got {dtype!r}")
    if seq_len < 2 or chunks < 1:
        raise PlanError(f"--seq-len is at least 2 and --chunks at least 1; got {seq_len} and {chunks}")
    form = activations or os.environ.get(ACTIVATIONS_VARIABLE) or EXACT
    if form not in FORMS:
        raise PlanError(f"--activations is one of {', '.join(FORMS)}; got {form!r}")
    with layers_made_with(form):
        result = with_progress(lambda step: compare(checkpoint, against, text, seq_len, chunks, dtype, step))
    result["activations"] = form
    if json_output:
        print(json.dumps(result))
        return
    table = Table(show_header=False, box=None)
    for key in KEYS:
        value = result[key]
        if value is not None:
            shown = ".4f" if isinstance(value, float) else "," if isinstance(value, int) else ""
            table.add_row(key.replace("_", " "), format(value, shown))
    Console().print(table)


def with_progress(action: Any) -> dict[str, Any]:
    """What action(step) returns, with a progress bar on stderr; step(done, of)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        return action(lambda done, of: progress.update(task, completed=done, total=of))
