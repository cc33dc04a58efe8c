"""The plans of `quantize run`: read from a file, or made for a budget first; and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import with_progress
from .plan import PlannerOptions, budget_of, command_line, planned, with_planner

if TYPE_CHECKING:
    from ..calibrate.text import Calibration
    from ..formats.plan_file import StoredPlan

FOLDER = ".plan"
"""Behind the output's name: the folder of what a plan measures, where --stats names none; gone once the run is done."""


@dataclass(frozen=True)
class RunBudget:
    """The options of `quantize run` that ask for a plan, or for none. method: names of those given that say how every
    layer is coded."""

    bits: float | None = None
    uniform: bool = False
    size: str | None = None
    memory: str | None = None
    context: int | None = None
    batch: int = 1
    tokens_per_second: float | None = None
    threads: int | None = None
    method: list[str] = field(default_factory=list)

    @property
    def limits(self) -> list[str]:
        """Options that only a plan can follow."""
        given: dict[str, object] = {"--size": self.size, "--memory": self.memory, "--context": self.context}
        given["--tokens-per-second"] = self.tokens_per_second
        return [name for name, value in given.items() if value is not None]

    @property
    def planned(self) -> bool:
        """--bits alone is an average; with a method, or --uniform, it is everybody's."""
        alone = self.bits is not None and self.bits != 16 and not self.method and not self.uniform
        return alone or bool(self.limits)


def plan_for_run(
    model: str,
    out: Path,
    plan_file: Path | None,
    budget: RunBudget,
    options: PlannerOptions,
    stats: Path | None,
    refine: int,
    dry_run: bool,
) -> tuple[StoredPlan | None, Path | None]:
    """(the plan, None where every layer is coded alike; the folder of statistics). PlanError for options that
    contradict each other."""
    from ..calibrate.plan import PlanError

    o = options
    given = {"--bits": budget.bits, "--keep": o.keep, "--set": o.set_, "--palette": o.palette, "--serve": o.serve}
    others = [*(name for name, value in given.items() if value), *budget.method, *budget.limits]
    if plan_file is not None:
        if others:
            raise PlanError(f"--plan {plan_file} says what {others[0]} would: leave one of them out, or edit the plan")
        return read_for(plan_file, model), stats
    of_plan = [name for name in ("--palette", "--serve") if given[name]]
    if not budget.planned:
        if of_plan:
            raise PlanError(f"{of_plan[0]} is of plans: give a budget, such as --bits 3 without --uniform or a method")
        return None, stats
    if budget.method or budget.uniform:
        same = budget.method[0] if budget.method else "--uniform"
        raise PlanError(
            f"{budget.limits[0]} is met by a plan, {same} codes every layer alike: leave one of them out, or choose "
            "schemes with --palette"
        )
    folder = stats or out.with_name(out.name + FOLDER)
    known = _finished(out, folder, model)
    if known is not None:
        return known, folder
    if dry_run:
        raise PlanError("--dry-run does not plan, which takes minutes: `quantize plan` does, then --plan --dry-run")
    return _made(model, folder, budget, options, refine), folder


def _made(model: str, folder: Path, budget: RunBudget, options: PlannerOptions, refine: int) -> StoredPlan:
    """A plan for the budget, kept in the folder so that an interrupted run does not make it again."""
    from ..formats.plan_file import PLAN_NAME, write_plan

    b = budget
    wanted = budget_of(b.bits, b.size, b.memory, b.context, b.batch, b.tokens_per_second, b.threads)
    stored: StoredPlan = with_planner(lambda planner: planned(planner, wanted, refine), model, folder, options)
    write_plan(folder / PLAN_NAME, stored)
    return stored


def _finished(out: Path, folder: Path, model: str) -> StoredPlan | None:
    """The plan that the same command made before: of a finished checkpoint, or of a run that was interrupted."""
    from ..formats.plan_file import PLAN_NAME, read_plan

    for path in (out / PLAN_NAME, folder / PLAN_NAME):
        if path.exists():
            stored = read_plan(path)
            if stored.command == command_line() and stored.model == _fingerprint(model):
                return stored.model_copy(update={"measured": None})
    return None


def _fingerprint(model: str) -> str:
    from ..formats.base import open_source

    return open_source(model).fingerprint()


def read_for(path: Path, model: str) -> StoredPlan:
    """The plan in a file. PlanError where it was made for another model."""
    from ..calibrate.plan import PlanError
    from ..formats.plan_file import read_plan

    stored = read_plan(path)
    if stored.model != _fingerprint(model):
        raise PlanError(f"{path} was made for another model than {model}; plan that one")
    return stored


def bless(
    compilation: Any, stored: StoredPlan, calibration: Calibration, verify_kl: float | None, as_json: bool
) -> None:
    """Measure what was written, say it beside what was predicted, and keep it in the checkpoint. With `verify_kl` a
    worse result loses its manifest, without which nothing loads it."""
    from rich.console import Console

    from ..calibrate.plan import PlanError
    from ..plan_result import measure_result, store_result, take_back

    out = compilation.out
    measured = with_progress(lambda step: measure_result(compilation, calibration, step))
    store_result(out, stored, measured)
    predicted = stored.predicted
    line = f"KL {measured.kl:.4f} ± {measured.kl_se:.4f} measured, {predicted.kl:.4f} ± {predicted.kl_se:.4f} predicted"
    line += f"; perplexity {measured.perplexity:.2f}, original {measured.reference_perplexity:.2f}"
    Console(stderr=as_json, soft_wrap=True, highlight=False).print(line)
    if verify_kl is not None and not measured.kl <= verify_kl:
        take_back(out)
        raise PlanError(
            f"{out}: KL {measured.kl:.4f} is more than --verify-kl {verify_kl:g}; it is left without a manifest, so "
            "that nothing loads it: give more bits, or --effort best"
        )
