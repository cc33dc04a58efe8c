"""Tokens a second and time to the first token: packed checkpoints against the model they came from in bf16.

    python bench/generate.py ORIGINAL PACKED [PACKED ...] [--threads 1] [--clock wall|cpu] [--gguf FILE] [--json FILE]

ORIGINAL runs in transformers, in bf16; packed ones by `bitpalette.generate`; --gguf adds llama.cpp, where
llama-cpp-python is installed. Greedy. All take turns, round by round. The time of a token is that of --new-tokens less
that of 4, by the tokens between; the first token's is that of a prompt of --prompt-tokens and one token. Rows give the
median of the rounds with p20 and p80, and the median of a round's ratio to the original.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import bitpalette
from bitpalette.kernels.decoder import why_not
from bitpalette.provenance import commit, processor

FEW = 4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    name: str
    native: str
    tokens_per_second: float
    p20: float
    p80: float
    times_original: float
    first_token_seconds: float
    first_token_times_original: float
    threads: int
    clock: str
    device: str
    commit: str


Write = Callable[[list[int], int], Any]
"""Goes on after a prompt by so many tokens."""


def original(path: str) -> Write:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def write(prompt: list[int], count: int) -> Any:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return write


def packed(path: str) -> tuple[Write, str]:
    model = bitpalette.load(path, dtype=torch.bfloat16)

    def write(prompt: list[int], count: int) -> Any:
        return bitpalette.generate(model, torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count)

    return write, why_not(model) or "native"


def llama_cpp(path: Path, threads: int, positions: int) -> Write:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(prompt: list[int], count: int) -> Any:
        model.reset()
        model.eval(prompt)
        for _ in range(count - 1):
            model.eval([model.sample(temp=0)])

    return write


def main(
    model: str,
    checkpoints: list[str],
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(min=FEW + 1)] = 36,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="for the time to the first token")] = 512,
    clock: Annotated[str, typer.Option(help="wall, or cpu: what the process computed; for one thread")] = "wall",
    gguf: Annotated[Path | None, typer.Option(help="the same model for llama.cpp")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows there as well")] = None,
) -> None:
    """Time generation."""
    if clock not in CLOCKS:
        raise typer.BadParameter(f"--clock is one of {list(CLOCKS)}, got {clock!r}")
    if clock == "cpu" and threads > 1:
        raise typer.BadParameter("--clock cpu counts all threads' time; it is for --threads 1")
    torch.set_num_threads(threads)
    now = CLOCKS[clock]
    contenders: dict[str, tuple[Write, str]] = {"original, bf16": (original(model), "transformers")}
    contenders |= {Path(path).name: packed(path) for path in checkpoints}
    if gguf is not None:
        contenders[f"llama.cpp {gguf.name}"] = llama_cpp(gguf, threads, prompt_tokens + new_tokens + 8), "llama.cpp"
    short = list(range(100, 108))
    long = [(7 * i) % 1000 + 100 for i in range(prompt_tokens)]
    decode: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(write: Write, prompt: list[int], count: int) -> float:
        start = now()
        write(prompt, count)
        return now() - start

    for write, _ in contenders.values():
        write(short, FEW)
    gc.collect()
    for i in range(rounds):
        for name, (write, _) in contenders.items():
            few, many = timed(write, short, FEW), timed(write, short, new_tokens)
            decode[name].append((many - few) / (new_tokens - FEW))
            if i < 3:
                first[name].append(timed(write, long, 1))
    base = "original, bf16"
    rows = []
    for name, (_, native) in contenders.items():
        ordered = sorted(decode[name])
        rows.append(
            Row(
                name=name,
                native=native,
                tokens_per_second=round(1 / statistics.median(ordered), 1),
                p20=round(1 / ordered[int(0.8 * (rounds - 1) + 0.5)], 1),
                p80=round(1 / ordered[int(0.2 * (rounds - 1) + 0.5)], 1),
                times_original=round(
                    statistics.median(b / a for a, b in zip(decode[name], decode[base], strict=True)), 2
                ),
                first_token_seconds=round(statistics.median(first[name]), 3),
                first_token_times_original=round(
                    statistics.median(b / a for a, b in zip(first[name], first[base], strict=True)), 2
                ),
                threads=threads,
                clock=clock,
                device=processor(),
                commit=commit(),
            )
        )
    title = f"{processor()}, {threads} thread(s), {clock} time, commit {commit()}"
    table = Table(
        "", "runs by", "tokens/s", "p20", "p80", "x bf16", f"{prompt_tokens} tokens, s", "x bf16", title=title
    )
    for r in rows:
        values = (r.tokens_per_second, r.p20, r.p80, r.times_original)
        table.add_row(
            r.name, r.native, *map(str, values), str(r.first_token_seconds), str(r.first_token_times_original)
        )
    Console(width=120).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
