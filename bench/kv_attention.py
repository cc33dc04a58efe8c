"""Attention of one new token over a cache: packed pages against torch's attention over a bfloat16 cache.

    python bench/kv_attention.py [--tokens 8192] [--format k4v4] [--shape Llama-8B] [--threads 1] [--rounds 15]

Both take turns, round by round; medians with p20 and p80 in microseconds of processor time (of the whole process, so
one thread's is its wall time without other processes), the packed cache's bytes a second, and how many times as fast it
is. The packed cache's time has the rotations of query and output in it. With several layers (--layers), each round
attends over all of them in turn: what a model's memory is like.

Torch takes the heads of a kv head as so many queries of one head, 9 times as fast here as its own `enable_gqa`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bitpalette.kernels.kv_cpu import Dense, KVCpu, Pages
from bitpalette.quant.kv_format import PAGE, KVFormat
from bitpalette.quant.kv_token import packed_bytes
from bitpalette.quant.native import chosen_isa

SHAPES = {"Llama-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
"""{name: (query heads, kv heads, head_dim)}"""

SINKS, WINDOW = 4, 64


def packed_cache(form: KVFormat, kv_heads: int, head_dim: int, tokens: int) -> tuple[Pages, Dense, Dense]:
    """Random codes: what they are changes no time."""
    inside = tokens - SINKS - WINDOW
    count = -(-inside // PAGE)
    codes = [
        torch.randint(0, 256, (count, kv_heads, PAGE, packed_bytes(head_dim, bits)), dtype=torch.uint8)
        for bits in (form.bits_k, form.bits_v)
    ]
    gains = [torch.rand(count, kv_heads, PAGE).add_(0.5).mul_(0.2).half() for _ in range(2)]
    table = torch.arange(count, dtype=torch.int32)[None]
    length = torch.tensor([inside], dtype=torch.int32)
    pages = Pages(codes[0], gains[0], codes[1], gains[1], form.bits_k, form.bits_v, table, length)

    def dense(n: int) -> Dense:
        k, v = (torch.randn(1, n, kv_heads, head_dim).bfloat16() for _ in range(2))
        return Dense(k, v, torch.tensor([n], dtype=torch.int32))

    return pages, dense(SINKS), dense(WINDOW)


def dense_cache(kv_heads: int, head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(1, kv_heads, tokens, head_dim).bfloat16() for _ in range(2))
    return k, v


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e6


def spread(times: list[float]) -> str:
    low, *_, high = statistics.quantiles(times, n=5)
    return f"{statistics.median(times):9.0f} ({low:.0f} .. {high:.0f})"


def main(
    tokens: Annotated[list[int], typer.Option()] = [8192, 32768],  # noqa: B006
    form: Annotated[list[str], typer.Option("--format")] = ["k4v4", "k3v3", "k2v2"],  # noqa: B006
    shape: Annotated[list[str], typer.Option()] = list(SHAPES),  # noqa: B006
    threads: int = 1,
    rounds: int = 15,
    layers: int = 4,
    exact: bool = False,
) -> None:
    torch.set_num_threads(threads)
    kernel = KVCpu()
    print(f"{chosen_isa()}, {threads} threads, {layers} layers, microseconds a layer: median (p20 .. p80)")
    for name in shape:
        heads, kv_heads, head_dim = SHAPES[name]
        q = torch.randn(1, heads, 1, head_dim).bfloat16()
        for length in tokens:
            dense = [dense_cache(kv_heads, head_dim, length) for _ in range(layers)]
            for each in form:
                caches = [packed_cache(KVFormat.parse(each), kv_heads, head_dim, length) for _ in range(layers)]

                def ours(q: Tensor = q, caches: list[tuple[Pages, Dense, Dense]] = caches) -> None:
                    for pages, sinks, window in caches:
                        out = kernel.attend(
                            kernel.rotate(q, torch.float32),
                            pages,
                            sinks,
                            window,
                            scale=q.shape[-1] ** -0.5,
                            exact=exact,
                        )
                        kernel.rotate(out, torch.bfloat16)

                def theirs(q: Tensor = q, dense: list[tuple[Tensor, Tensor]] = dense) -> None:
                    for k, v in dense:
                        F.scaled_dot_product_attention(q.view(1, k.shape[1], -1, k.shape[3]), k, v)

                times: tuple[list[float], list[float]] = ([], [])
                for r in range(rounds + 2):
                    for call, kept in zip((ours, theirs), times, strict=True):
                        took = timed(call) / layers
                        if r >= 2:
                            kept.append(took)
                pages = caches[0][0]
                size = sum(t.nbytes for t in (pages.k_codes, pages.v_codes, pages.k_gain, pages.v_gain))
                ratio = statistics.median(times[1]) / statistics.median(times[0])
                rate = size / statistics.median(times[0]) / 1e3
                print(
                    f"{name:13} {length:6} {each}: {spread(times[0])}, {rate:5.1f} GB/s; "
                    f"torch bf16 {spread(times[1])}: {ratio:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
