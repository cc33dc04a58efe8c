"""A whole decode step of a model with a long context: packed caches against transformers' cache in the model's dtype.

    python bench/kv_step.py MODEL [--tokens 8000] [--format k4v4] [--threads 1] [--rounds 15]

The model is what the folder holds (a packed checkpoint as well), in bfloat16; the context is random keys and values.
Caches take turns, step by step; medians with p20 and p80 in milliseconds of processor time, and for packed caches the
share of the step that is spent on storing new tokens (rotation, codes, window).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, DynamicCache

import bitpalette  # noqa: F401  (transformers learns of packed checkpoints)
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache

DENSE = "16 bits"


def heads_of(config: Any) -> tuple[int, int]:
    """(kv_heads, head_dim)"""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, width


def filled(model: Any, form: str, tokens: int) -> Any:
    """A cache of `tokens` random tokens."""
    kv_heads, width = heads_of(model.config)
    cache: Any = DynamicCache(config=model.config) if form == DENSE else QuantizedCache(model.config, form, 2 * tokens)
    for index, layer in enumerate(cache.layers):
        k, v = (torch.randn(1, kv_heads, tokens, width).to(model.dtype) for _ in range(2))
        if form == DENSE:
            cache.update(k, v, index)
            continue
        layer.put(k, v, np.zeros(1, np.int64))
    return cache


class Storing:
    """Processor time within `KVRows.stored` and `KVRows.append`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("stored", "append"):
            setattr(KVRows, name, self.timed(getattr(KVRows, name)))

    def timed(self, method: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.process_time()
            try:
                return method(*args)
            finally:
                self.seconds += time.process_time() - start

        return call


def spread(times: list[float]) -> str:
    low, *_, high = statistics.quantiles(times, n=5)
    return f"{1e3 * statistics.median(times):8.1f} ({1e3 * low:.1f} .. {1e3 * high:.1f})"


@torch.inference_mode()
def main(
    model_path: Annotated[Path, typer.Argument(metavar="MODEL")],
    tokens: int = 8000,
    form: Annotated[list[str], typer.Option("--format")] = ["k4v4", "k3v3", "k2v2"],  # noqa: B006
    threads: int = 1,
    rounds: int = 15,
) -> None:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    model.set_attn_implementation(NAME)
    caches = {name: filled(model, name, tokens) for name in (DENSE, *form)}
    times: dict[str, list[float]] = {name: [] for name in caches}
    shares: dict[str, list[float]] = {name: [] for name in caches}
    storing = Storing()
    for turn in range(rounds + 2):
        for name, cache in caches.items():
            model.set_attn_implementation("sdpa" if name == DENSE else NAME)
            storing.seconds, start = 0.0, time.process_time()
            model(input_ids=torch.full((1, 1), 100 + turn), past_key_values=cache)
            took = time.process_time() - start
            if turn >= 2:
                times[name].append(took)
                shares[name].append(storing.seconds / took)
    print(f"{model_path.name}, {tokens} tokens of context, {threads} threads, ms a step: median (p20 .. p80)")
    for name, of in times.items():
        ratio = statistics.median(times[DENSE]) / statistics.median(of)
        share = "" if name == DENSE else f", storing {100 * statistics.median(shares[name]):.1f} %"
        print(f"{name:8} {spread(of)}: {ratio:.2f}x{share}")


if __name__ == "__main__":
    typer.run(main)
