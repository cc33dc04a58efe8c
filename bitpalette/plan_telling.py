"""A solved plan with what is predicted of it, as a file keeps it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ._version import __version__
from .calibrate.kv_allocate import name_of
from .formats.plan_file import PlanBytes, PlannedCache, PlannedWeight, Prediction, Round, SolverNotes, StoredPlan
from .plan_amounts import CHUNK, DTYPE, MemoryAmounts
from .plan_budget import Budget
from .plan_memory import GB, Memory, longest_context
from .planning import Planner, Solved
from .quant.tensor import stored_bytes


def stored_plan(
    p: Planner, solved: Solved, budget: Budget, rounds: Sequence[Round] = (), command: str = ""
) -> StoredPlan:
    """A plan as it is kept. command: that it was made with."""
    compilation, chosen = p.compiled(solved.plan), solved.chosen
    schemes, sizes = compilation.schemes, compilation.sizes()
    planned, parts = {}, Counter[str]()
    for name, scheme in schemes.items():
        shape, s = p.weights[name].shape, p.sensitivities[name]
        size = stored_bytes(scheme, shape)
        part = p.part(name)
        parts[part] += size
        cost, alpha = p.cost(name, scheme), s.alpha + s.embedding_alpha
        planned[name] = PlannedWeight(
            part=part,  # type: ignore[arg-type]
            shape=list(shape),
            bits=round(8 * size / math.prod(shape), 6),
            bytes=size,
            scheme=str(scheme),
            alpha=alpha,
            alpha_se=math.hypot(s.alpha_se, s.embedding_alpha_se),
            share=cost / alpha if alpha > 0 else 0.0,
            predicted=cost,
        )
    cache = None if solved.cache is None else _cache(p, solved.cache, budget)
    kl = sum(w.predicted for w in planned.values()) + sum(c.predicted for c in (cache or {}).values())
    error = math.sqrt(sum(p.variance(n, s) for n, s in schemes.items()))
    if rounds:
        error = math.hypot(error, kl * rounds[-1].measured_se / max(rounds[-1].measured, 1e-12))
    reference = p.reference_perplexity
    return StoredPlan(
        bitpalette_version=__version__,
        command=command,
        model=p.source.fingerprint(),
        text=p.calibration.fingerprint(),
        text_name=Path(p.calibration.text).name,
        tokens=p.calibration.tokens,
        effort=p.effort,
        budget=budget.values(),
        plan=solved.plan.to_dict(),
        weights=planned,
        cache=cache,
        bytes=PlanBytes(
            linear=parts["linear"],
            head=parts["head"],
            embedding=parts["embedding"],
            other=sizes.file_bytes - sum(parts.values()),
            file=sizes.file_bytes,
            cache=0 if cache is None else sum(layer.bytes for layer in cache.values()),
            memory=None if solved.memory is None else solved.memory.total,
        ),
        bits_per_weight=sizes.bits_per_weight,
        predicted=Prediction(
            kl=kl,
            kl_se=error,
            perplexity=None if reference is None else reference * math.exp(p.perplexity_slope * kl),
            reference_perplexity=reference,
            tokens_per_second=solved.tokens_per_second,
        ),
        solver=SolverNotes(
            seconds=chosen.seconds,
            gap=chosen.gap,
            bound=chosen.bound,
            exact=chosen.exact,
            candidates=max(len(menu) for menu in p.candidates.values()),
            items=len(p.groups()) + len(solved.cache or {}),
        ),
        rounds=list(rounds),
        contexts={} if solved.memory is None else _contexts(p, solved, solved.memory, budget),
    )


def _contexts(p: Planner, solved: Solved, memory: Memory, budget: Budget) -> dict[str, int]:
    """Tokens of context that fit into common memories."""
    assert p.cache is not None and solved.cache is not None
    kv = MemoryAmounts(p.skeleton.model, p.weights, p.cache, budget).plan(solved.cache)
    found = longest_context(
        p.skeleton.model, solved.schemes, kv, batch=budget.batch, dtype=DTYPE, chunk=CHUNK, base=memory.base
    )
    return {f"{size // GB}GB": tokens for size, tokens in found.items()}


def _cache(p: Planner, pairs: Mapping[int, tuple[int, int]], budget: Budget) -> dict[int, PlannedCache]:
    assert p.cache is not None
    amounts = MemoryAmounts(p.skeleton.model, p.weights, p.cache, budget)
    found = {}
    for item in amounts.items():
        number = int(item.names[0].rpartition(" ")[2])
        candidate = next(c for c in item.candidates if c.name == pairs[number])
        found[number] = PlannedCache(
            format=name_of(pairs[number]),
            bytes=round(candidate.amounts["memory"] / amounts.copies),
            predicted=candidate.cost,
        )
    return found
