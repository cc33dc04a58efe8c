"""`quantize eval`: perplexity, and distance from the original."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from ..kv_needle import Cell
    from ..quant.kv_plan import KVPlan

T = TypeVar("T", int, float)

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
KV_KEYS = (
    "kv",
    "kv_step",
    "kv_dense_perplexity",
    "kv_kl_divergence",
    "kv_kl_standard_error",
    "kv_kl_of_packed_reads",
    "kv_top1_agreement",
    "kv_bits_per_element",
    "kv_bytes",
    "kv_formula_bytes",
    "kv_dense_bytes",
)
"""With --kv. "kv_kl": from the same model with a dense cache, where "kl_divergence" is from the original."""


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
    kv: Annotated[
        str | None,
        typer.Option(
            help="Read keys and values from a packed cache: k4v4, k3v2, plan (the checkpoint's), auto:3.25.",
            show_default="no cache; with --needle the checkpoint's plan",
        ),
    ] = None,
    kv_step: Annotated[
        int, typer.Option(help="With --kv: tokens of a forward; all before them are in the cache.")
    ] = 16,
    needle: Annotated[
        bool, typer.Option("--needle", help="Find numbers in long text instead, dense cache against packed.")
    ] = False,
    lengths: Annotated[str, typer.Option(help="With --needle: tokens of the prompts.")] = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="With --needle: where in the prompt, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of CHECKPOINT and, against the original, the mean KL divergence (nats a token) and top-1 agreement.

    With --kv all of it through a packed cache, and the same against the dense cache of CHECKPOINT, with its bytes.
    """
    from rich.console import Console
    from rich.table import Table

    from ..calibrate.plan import PlanError
    from ..evaluation import compare, needles
    from ..kernels.activation_form import ACTIVATIONS_VARIABLE, EXACT, FORMS, layers_made_with

    if dtype not in ("float32", "bfloat16", "float16"):
        raise PlanError(f"--dtype is float32, bfloat16 or float16; got {dtype!r}")
    if seq_len < 2 or chunks < 1:
        raise PlanError(f"--seq-len is at least 2 and --chunks at least 1; got {seq_len} and {chunks}")
    form = activations or os.environ.get(ACTIVATIONS_VARIABLE) or EXACT
    if form not in FORMS:
        raise PlanError(f"--activations is one of {', '.join(FORMS)}; got {form!r}")
    if kv_step < 1:
        raise PlanError(f"--kv-step is at least 1; got {kv_step}")
    if needle:
        if against is not None:
            raise PlanError("--needle compares the caches of one model; leave --against out")
        sizes, places = numbers("--lengths", lengths, 1, float("inf"), int), numbers("--depths", depths, 0, 1, float)
        with layers_made_with(form):
            plan, cells = with_progress(lambda step: needles(checkpoint, kv, text, sizes, places, dtype, step))
        show_needles(plan, cells, json_output)
        return
    with layers_made_with(form):
        result = with_progress(
            lambda step: compare(checkpoint, against, text, seq_len, chunks, dtype, step, kv, kv_step)
        )
    result["activations"] = form
    if kv is not None:
        result["kv"] = kv
    if json_output:
        print(json.dumps(result))
        return
    table = Table(show_header=False, box=None)
    for key in (*KEYS, *KV_KEYS):
        value = result.get(key)
        if value is not None:
            shown = ".4f" if isinstance(value, float) else "," if isinstance(value, int) else ""
            table.add_row(key.replace("_", " "), format(value, shown))
    Console().print(table)


def numbers(option: str, text: str, least: float, most: float, kind: Callable[[str], T]) -> list[T]:
    """ "512,1024" -> [512, 1024]. PlanError names the option where one is none, or out of bounds."""
    from ..calibrate.plan import PlanError

    found = []
    for part in text.split(","):
        try:
            value = kind(part)
        except ValueError:
            raise PlanError(f"{option} is numbers with commas between; got {part!r}") from None
        if not least <= float(value) <= most:
            raise PlanError(f"{option}: {part} is not in {least:g} .. {most:g}")
        found.append(value)
    return found


def show_needles(plan: KVPlan, cells: list[Cell], json_output: bool) -> None:
    """A line for every cell: what the model answers with the dense cache, and with the packed one."""
    from rich.console import Console
    from rich.table import Table

    if json_output:
        print(json.dumps({"kv": str(plan.default), "cells": [dataclasses.asdict(cell) for cell in cells]}))
        return
    table = Table(
        "tokens", "depth", "answered, dense", "packed", "probability, dense", "packed", "rank, dense", "packed"
    )
    for cell in cells:
        pairs = [
            format(getattr(score, name), shown)
            for name, shown in (("answered", ".0%"), ("probability", ".3f"), ("rank", ".2f"))
            for score in (cell.dense, cell.packed)
        ]
        table.add_row(f"{cell.length:,}", f"{cell.depth:g}", *pairs)
    Console().print(table)


def with_progress(action: Any) -> Any:
    """What action(step) returns, with a progress bar on stderr; step(done, of)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        return action(lambda done, of: progress.update(task, completed=done, total=of))
