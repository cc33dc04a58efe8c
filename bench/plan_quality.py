"""Plans of average bits against the same scheme everywhere: KL divergence predicted, and measured on another text.

    python bench/plan_quality.py MODEL --stats S --calib valid.txt --text test.txt [--bits 4,3,2.5] [--effort fast]

For every budget a plan is solved and refined on the calibration text; then it and the uniform trellis of that rate (its
scales come on top of the budget) are rounded, and all are measured in one pass over `--text`. Only --out is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bitpalette import plan_refine
from bitpalette.calibrate.evaluate import chunks_of
from bitpalette.calibrate.measure_plan import difference, measure_plans
from bitpalette.calibrate.text import Calibration, read_text
from bitpalette.calibrate.whole import load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.palette import palette
from bitpalette.plan_budget import Budget
from bitpalette.plan_refine import Refinement
from bitpalette.plan_telling import stored_plan
from bitpalette.planning import Planner
from bitpalette.provenance import commit, processor
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.trellis import TrellisScheme
from bitpalette.recipe import EFFORTS, make_plan


def main(
    model: str,
    stats: Annotated[Path, typer.Option(help="Folder of what is measured.")],
    calib: Annotated[Path, typer.Option(help="Calibration text.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    bits: Annotated[str, typer.Option(help="Budgets; a uniform rate is beside each that is one.")] = "4,3,2.5",
    effort: str = "fast",
    rounds: Annotated[int, typer.Option(help="Of refinement.")] = 1,
    calib_tokens: int = 65536,
    chunks: Annotated[int, typer.Option(help="Of 512 tokens.")] = 16,
    uniform: Annotated[bool, typer.Option(help="Whether the uniform trellis is measured, too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Where rows go, as JSON.")] = None,
) -> None:
    source = open_source(model)
    budgets = [float(b) for b in bits.split(",")]
    template = make_plan(bits=4, effort=effort, head_bits=16, embed_bits=16)
    plan_refine.WINDOW = EFFORTS["fast"]
    rows: list[dict[str, Any]] = []
    plans: list[Mapping[str, Scheme]] = []
    planner: Planner | None = None
    for budget in budgets:
        start = time.perf_counter()
        planner = Planner(
            source, template, palette((), effort), (), Calibration(str(calib), calib_tokens, 512), stats, effort=effort
        )
        planner.measure()
        rate_scheme = _uniform(planner, budget)
        asked = Budget(bits=budget)
        first = planner.solve(asked)
        refinement = Refinement(planner)
        solved, told = refinement.refine(asked, rounds)
        stored = stored_plan(planner, solved, asked, told)
        row = {
            "bits": budget,
            "stored_bits": stored.bits_per_weight,
            "predicted_at_first": first.chosen.cost,
            "predicted": stored.predicted.kl,
            "predicted_se": stored.predicted.kl_se,
            "bought": told[-1].bought if told else 0.0,
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows.append(row)
        plans.append(planner.compiled(solved.plan).schemes)
        if uniform and rate_scheme is not None:
            plans.append(dict.fromkeys(planner.candidates, rate_scheme))
            row["uniform"] = len(plans) - 1
        row["plan"] = len(plans) - 1 - ("uniform" in row)
        Console(stderr=True).print(row)
    assert planner is not None
    tokens = chunks_of(load_tokenizer(source), read_text(str(text)), 512, chunks)
    rounder = Refinement(planner)._rounder
    found = measure_plans(planner.skeleton, planner.weights, tokens, plans, rounder, planner.compilation.dtype)
    table = Table("bits", "stored", "predicted first", "refined", "measured", "uniform", "less by", box=None)
    for row in rows:
        plan = found[row.pop("plan")]
        row |= {"kl": plan.kl, "kl_se": plan.standard_error, "perplexity": plan.perplexity, "top1": plan.top1}
        cells = [f"{row['bits']:g}", f"{row['stored_bits']:.3f}", f"{row['predicted_at_first']:.4f}"]
        cells += [f"{row['predicted']:.4f} ± {row['predicted_se']:.4f}", f"{plan.kl:.4f} ± {plan.standard_error:.4f}"]
        if "uniform" in row:
            other = found[row.pop("uniform")]
            gap, error = difference(other, plan)
            row |= {"uniform_kl": other.kl, "less": gap / other.kl, "less_se": error / other.kl}
            cells += [f"{other.kl:.4f}", f"{100 * gap / other.kl:.1f} % ± {100 * error / other.kl:.1f}"]
        table.add_row(*cells)
    Console(width=120).print(table)
    if out is not None:
        about = {"model": Path(model).name, "effort": effort, "chunks": chunks, "calib": calib.name, "text": text.name}
        about |= {"calib_tokens": str(calib_tokens), "processor": processor(), "commit": commit()}
        out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def _uniform(planner: Planner, bits: float) -> Scheme | None:
    """The trellis of that rate in every layer, None where there is no such rate."""
    menu = next(iter(planner.candidates.values()))
    return next((s for s in menu if isinstance(s, TrellisScheme) and s.rate == bits), None)


if __name__ == "__main__":
    typer.run(main)
