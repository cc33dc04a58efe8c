"""Tokens a second that `bitpalette/plan_latency.py` predicts beside those of the model; exit 1 where 10 % apart.

    python bench/plan_speed.py MODEL [--threads 1] [--again]

For three targets, between what the fastest and the slowest of SCHEMES give, the MLPs of the first blocks get the slow
scheme and all other layers the fast one, so many that the prediction is the target. The mix is built with random codes
and its decode steps are timed, the three in turn: median with p20 and p80.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from bitpalette.calibrate.plan import parse_scheme
from bitpalette.calibrate.structure import quantizable
from bitpalette.plan_latency import LatencyTable, Layer
from bitpalette.plan_step import random_model, step_times
from bitpalette.provenance import commit, processor

SCHEMES = ("int,bits=2,group_size=64,transforms=[\"rotate\"]", "int,bits=4,group_size=64,transforms=[\"rotate\"]",
           "trellis,rate=2.5,transforms=[\"rotate\"]")  # fmt: skip
HEAD = "int,bits=8"
SHARES = (0.2, 0.5, 0.8)
"""Of the way from the fastest to the slowest plan, in seconds."""

ALLOWED = 0.10


def mixed(weights: Mapping[str, Any], fast: Any, slow: Any, slow_layers: int) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    inside = [name for name, weight in weights.items() if not weight.head and not weight.embedding]
    slow_names = set(inside[:slow_layers])
    for name, weight in weights.items():
        if weight.head:
            layers[name] = parse_scheme(HEAD, None), weight.shape
        elif name in inside:
            layers[name] = slow if name in slow_names else fast, weight.shape
    return layers


def main(
    model_path: Annotated[Path, typer.Argument(metavar="MODEL")],
    threads: int = 1,
    rounds: int = 3,
    again: Annotated[bool, typer.Option(help="measure anew what is kept of this machine")] = False,
) -> None:
    """Predict and measure."""
    config = transformers.AutoConfig.from_pretrained(model_path)
    with torch.device("meta"):
        weights = quantizable(getattr(transformers, config.architectures[0])(config))
    schemes = [parse_scheme(text, None) for text in SCHEMES]
    times = LatencyTable(threads, again=again, step=lambda text: print(text, file=sys.stderr, flush=True))
    count = sum(not w.head and not w.embedding for w in weights.values())
    reference = mixed(weights, schemes[1], schemes[1], 0)

    def seconds(layers: dict[str, Layer]) -> float:
        return times.seconds(config, layers, reference).median

    pure = sorted(schemes, key=lambda scheme: seconds(mixed(weights, scheme, scheme, 0)))
    fast, slow = pure[0], pure[-1]
    ends = [seconds(mixed(weights, fast, slow, n)) for n in (0, count)]
    mixes, targets = [], [1 / (ends[0] + share * (ends[1] - ends[0])) for share in SHARES]
    for target in targets:
        best = min(range(count + 1), key=lambda n: abs(seconds(mixed(weights, fast, slow, n)) - 1 / target))
        mixes.append(mixed(weights, fast, slow, best))
    models = [random_model(config, {name: scheme for name, (scheme, _) in mix.items()}) for mix in mixes]
    found = [[step_times(model, threads) for model in models] for _ in range(rounds)]
    table = Table("target", "predicted", "p20", "p80", "measured", "p20", "p80", "off",
                  title=f"tokens/s, {processor()}, {threads} threads, commit {commit()}")  # fmt: skip
    worst = 0.0
    for i, (target, mix) in enumerate(zip(targets, mixes, strict=True)):
        predicted = times.tokens_per_second(config, mix, reference)
        median, p20, p80 = (statistics.median(getattr(r[i], name) for r in found) for name in ("median", "p80", "p20"))
        off = predicted.median * median - 1
        worst = max(worst, abs(off))
        values = (target, predicted.median, predicted.p20, predicted.p80, 1 / median, 1 / p20, 1 / p80)
        table.add_row(*(f"{v:.1f}" for v in values), f"{100 * off:+.1f} %")
    Console(width=110).print(table)
    if not worst <= ALLOWED:
        print(f"a prediction is {100 * worst:.1f} % off, {100 * ALLOWED:g} % are allowed", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
