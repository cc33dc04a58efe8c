"""How `quantize plan` finds which weight gets which scheme.

1. One pass over calibration text: second moments of every layer's input (kept in the folder of statistics).
2. Sensitivities: what white noise in a weight costs in KL divergence (calibrate/sensitivity.py).
3. What every candidate scheme leaves of it (calibrate/expected_error.py), from the Hessian and a sample of rows.
4. The cheapest choice within the budgets (calibrate/allocate.py).
5. True KL divergences, from which the costs of each kind of weight get a factor; then 4 again (plan_refine.py).

1 to 3 are kept in the folder, under a fingerprint: another budget is then solved in seconds.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .calibrate.allocate import Candidate, Chosen, Item, Limit, allocate
from .calibrate.collect_stats import calibration_tokens, collect_statistics, missing_parts
from .calibrate.compile import Compilation
from .calibrate.expected_error import Expected, expected_errors
from .calibrate.plan import Plan, PlanError, Rule
from .calibrate.sensitivity import fisher_sensitivities
from .calibrate.store import LayerStats, StatsStore
from .calibrate.text import Calibration
from .calibrate.weight_kinds import kinds_of
from .formats.base import Source
from .formats.kv_plan_file import StoredKVPlan
from .formats.sensitivity_file import Sensitivities, Sensitivity, read_sensitivities, write_sensitivities
from .plan_amounts import LatencyAmounts, MemoryAmounts, pairs_in
from .plan_budget import Budget
from .plan_errors import read_errors, write_errors
from .plan_memory import Memory
from .quant.scheme import Scheme, SchemeError
from .quant.tensor import stored_bytes

SENSITIVITIES = "sensitivities.safetensors"
SENSITIVITY_SEQ_LEN = 256
EXPERTS = 4
"""Of a stack, those with the largest part in alpha, whose rows are sampled."""

SIZE_ROUNDS = 4
"""Headers of files grow and shrink with the schemes in them: sizes are solved again until they fit."""

VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Weights that vLLM computes as one matrix, so that they must share a scheme."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Solved:
    """cache: {layer: (bits of keys, of values)}, None where the cache was not planned. memory: of a plan for memory."""

    plan: Plan
    chosen: Chosen
    schemes: Mapping[str, Scheme]
    cache: Mapping[int, tuple[int, int]] | None = None
    memory: Memory | None = None
    tokens_per_second: float | None = None


@dataclass
class Planner:
    """template: the plan whose schemes for layers, head and embeddings are to be chosen anew; weights that its rules
    name keep what these say. menu: candidates of layers; outer: of head and embeddings, empty: as the template has
    them. folder: of statistics and all that is measured. serve: "vllm" makes fused weights share a scheme."""

    source: Source
    template: Plan
    menu: Sequence[Scheme]
    outer: Sequence[Scheme]
    calibration: Calibration
    folder: Path
    serve: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    sensitivity_tokens: int = 4096
    refine_tokens: int = 2048
    cache: StoredKVPlan | None = None
    effort: str = "normal"
    progress: Progress = lambda phase, done, of: None
    compilation: Compilation = field(init=False)
    sensitivities: Mapping[str, Sensitivity] = field(init=False)
    errors: dict[str, dict[Scheme, Expected]] = field(init=False)
    factors: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    perplexity_slope: float = 1.0
    reference_perplexity: float | None = None
    store: StatsStore = field(init=False)

    def __post_init__(self) -> None:
        if self.serve not in (None, "vllm"):
            raise PlanError(f"--serve {self.serve!r}: there is vllm, whose fused weights share a scheme")
        self.compilation = self.compiled(self.template)
        if not self.compilation.schemes:
            raise PlanError(f"{self.source.path}: every weight is kept at 16 bits, nothing is left to plan")
        self.skeleton, self.weights = self.compilation.skeleton, self.compilation.weights
        self.skeleton.use(self.compilation.device)
        self.kinds = kinds_of(self.compilation.schemes)
        self.fixed = self._fixed()
        self.candidates = {name: self._candidates(name) for name in self.compilation.schemes}
        self.tokens: Tensor | None = None

    def compiled(self, plan: Plan) -> Compilation:
        """What would be run, all checks done; nothing is written."""
        return Compilation(
            self.source,
            plan,
            self.folder / "out",
            calibration=self.calibration,
            dtype=self.dtype,
            stats=self.folder,
            device=self.device,
            version=__version__,
        )

    def _fixed(self) -> set[str]:
        rules = [rule for rule in self.template.rules if rule.scheme is not None]
        other = {v: k for k, v in self.skeleton.tied.items()}
        return {n for n in self.weights for r in rules if r.matches(n) or (n in other and r.matches(other[n]))}

    def part(self, name: str) -> str:
        weight = self.weights[name]
        return "head" if weight.head else "embedding" if weight.embedding else "linear"

    def kind(self, name: str) -> str:
        """What the weight is within its block, the same in every block; outside, its part."""
        return self.kinds[name] if self.part(name) == "linear" else self.part(name)

    def _candidates(self, name: str) -> list[Scheme]:
        own, weight = self.compilation.schemes[name], self.weights[name]
        inside = self.part(name) == "linear"
        menu = self.menu if inside else self.outer
        if name in self.fixed or not menu:
            return [own]
        if inside and "rotate" not in own.transforms:  # folded into the weights beside it
            menu = [s.replace(transforms=tuple(t for t in s.transforms if t != "rotate")) for s in menu]
        fitting = []
        for scheme in menu:
            try:
                scheme.check_shape(weight.shape[-2:])
            except SchemeError:
                continue
            fitting.append(scheme)
        if not fitting:
            raise PlanError(f"{name} {list(weight.shape)}: no scheme of the palette fits; --keep it, or add one")
        return fitting

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Steps 1 to 3, what the folder lacks of them."""
        job = self.compilation.job
        origin = {k: job[k] for k in ("model", "calibration", "dtype")}
        origin["fold"] = self.template.seed if self.skeleton.fold is not None else None
        self.store = StatsStore(self.folder, origin)
        dtype = self.compilation.dtype
        if missing_parts(self.store, self.skeleton):
            collect_statistics(
                self.skeleton, self.weights, self.store, self._tokens(), dtype, self.told("statistics of inputs")
            )
        self.sensitivities = self._sensitivities(origin)
        self.errors = self._errors()

    def told(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, of: self.progress(phase, done, of)

    def _tokens(self) -> Tensor:
        if self.tokens is None:
            self.tokens = calibration_tokens(self.source, self.calibration, self.skeleton, self.compilation.dtype)
        return self.tokens

    def _sensitivities(self, origin: Mapping[str, Any]) -> Mapping[str, Sensitivity]:
        path = self.folder / SENSITIVITIES
        length = min(SENSITIVITY_SEQ_LEN, self.calibration.seq_len)
        count = min(max(2, self.sensitivity_tokens // length), self.calibration.sequences)
        if path.exists():
            found = read_sensitivities(path)
            if found.sequences >= count and set(found.weights) >= set(self.compilation.schemes):
                return found.weights
        tokens = self._tokens()
        tokens = tokens[torch.linspace(0, len(tokens) - 1, count).long(), :length]
        weights = {n: self.weights[n] for n in self.weights if not self.weights[n].router}
        measured = fisher_sensitivities(
            self.skeleton, weights, tokens, seed=self.template.seed, progress=self.told("sensitivities")
        )
        write_sensitivities(
            path,
            Sensitivities(
                measured,
                model=origin["model"],
                calibration=self.calibration.fingerprint(),
                sequences=len(tokens),
                seq_len=length,
                seed=self.template.seed,
                dtype="float32",
            ),
        )
        return measured

    def _errors(self) -> dict[str, dict[Scheme, Expected]]:
        """Expected errors of every candidate, those of the folder and the rest."""
        known = read_errors(self.folder, self.template.seed)
        lacking = {n for n, menu in self.candidates.items() if any(s not in known.get(n, {}) for s in menu)}
        parts = [*range(len(self.skeleton.blocks)), None]
        done = 0
        for index in parts:
            names = self.skeleton.parameters_of(index)
            wanted = [n for n in names if n in lacking]
            if wanted:
                stats = self.store.load(len(self.skeleton.blocks) if index is None else index, self.skeleton.device)
                whole = names if index is not None or self.skeleton.fold is not None else wanted
                with self.skeleton.loaded(whole) as originals, torch.no_grad():
                    for name in wanted:
                        known.setdefault(name, {}).update(self._errors_of(name, originals[name], stats.get(name)))
                        done += 1
                        self.progress("expected errors", done, len(lacking))
        if lacking:
            write_errors(self.folder, self.template.seed, known)
        return {n: {s: known[n][s] for s in menu} for n, menu in self.candidates.items()}

    def _errors_of(self, name: str, w: Tensor, stats: LayerStats | None) -> dict[Scheme, Expected]:
        solvers = {s: self.compilation.solver(name, s) for s in self.candidates[name]}
        seed, sensitivity = self.template.seed, self.sensitivities[name]
        rows = sensitivity.rows if sensitivity.rows.numel() else None
        if self.weights[name].kind == "conv1d":
            w = w.T
        if w.ndim == 2:
            assert not isinstance(stats, list)
            return expected_errors(w, solvers, stats, rows, seed)
        assert isinstance(stats, list)
        share = w.float().square().sum(-1) * (1 if rows is None else rows.to(w.device))
        weight = share.sum(-1)
        chosen = [e for e in weight.argsort(descending=True).tolist() if stats[e].tokens > 0][:EXPERTS]
        if not chosen:
            raise PlanError(f"{name}: no expert was reached by the calibration text; give more of it (--calib-tokens)")
        found = [expected_errors(w[e], solvers, stats[e], None if rows is None else rows[e], seed) for e in chosen]
        part = weight[chosen] / weight[chosen].sum().clamp(min=1e-300)
        return {s: _mean([f[s] for f in found], part.tolist()) for s in solvers}

    # --- solving -----------------------------------------------------------------------------------------------------

    def cost(self, name: str, scheme: Scheme) -> float:
        """Predicted KL divergence, nats a token, of this weight alone, with the factor of its kind."""
        found, s = self.errors[name][scheme], self.sensitivities[name]
        plain = s.alpha * found.output + s.embedding_alpha * found.table
        return plain * self.factors.get(self.kind(name), 1.0) * self.scale

    def variance(self, name: str, scheme: Scheme) -> float:
        found, s = self.errors[name][scheme], self.sensitivities[name]
        parts = (s.alpha_se * found.output, s.alpha * found.standard_error, s.embedding_alpha_se * found.table)
        return sum((p * self.factors.get(self.kind(name), 1.0) * self.scale) ** 2 for p in parts)

    def check(self, budget: Budget) -> None:
        """PlanError for a budget of bits or bytes that is too small for any plan, before anything is measured."""
        items = self.items(priced=False)
        limits = self._limits(budget, items, self._other_bytes())
        if limits:
            allocate(items, limits)

    def items(
        self, memory: MemoryAmounts | None = None, latency: LatencyAmounts | None = None, priced: bool = True
    ) -> list[Item]:
        """What is chosen for, groups that share a scheme as one; with `memory` the caches of layers too. priced: with
        costs, which take `measure` first."""
        items = [] if memory is None else memory.items()
        for names in self.groups():
            menus = [self.candidates[n] for n in names]
            shared = [s for s in menus[0] if all(s in menu for menu in menus[1:])]
            if not shared:
                raise PlanError(f"{names[0]} and {names[1]} share a scheme (--serve), and --set gives them different")
            candidates = []
            for scheme in shared:
                size = sum(stored_bytes(scheme, self.weights[n].shape) for n in names)
                cost = sum(self.cost(n, scheme) for n in names) if priced else 0.0
                amounts: dict[str, float] = {"bits": 8 * size, "size": size}
                if memory is not None:
                    amounts["memory"] = sum(memory.of_weight(n, scheme) for n in names)
                if latency is not None:
                    amounts["seconds"] = sum(latency.of_weight(n, scheme) for n in names)
                candidates.append(Candidate(scheme, cost, amounts))
            items.append(Item(tuple(names), tuple(candidates)))
        return items

    def groups(self) -> list[list[str]]:
        names = list(self.compilation.schemes)
        if self.serve is None:
            return [[name] for name in names]
        groups: dict[tuple[str, int], list[str]] = {}
        for i, name in enumerate(names):
            parent = name.removesuffix(".weight").rpartition(".")[0]
            fused = next((j for j, roles in enumerate(VLLM_FUSED) if _last_part(name) in roles), None)
            groups.setdefault((parent, fused) if fused is not None else (name, -1 - i), []).append(name)
        return list(groups.values())

    def solve(self, budget: Budget) -> Solved:
        """The cheapest plan within the budget. PlanError where there is none: by how much, and what the least is."""
        memory, latency = self._memory_amounts(budget), self._latency_amounts(budget)
        items = self.items(memory, latency)
        others = [] if memory is None else [self._memory_limit(memory, items)]
        others += [] if latency is None else [latency.limit(self.candidates)]
        fixed = self._other_bytes()
        for _ in range(SIZE_ROUNDS):
            chosen = allocate(items, [*self._limits(budget, items, fixed), *others])
            solved = self._solved(items, chosen, memory, latency)
            if budget.size_bytes is None:
                return solved
            over = self.compiled(solved.plan).sizes().file_bytes - budget.size_bytes
            if over <= 0:
                return solved
            fixed += over
        raise PlanError(f"no plan was found whose files have {budget.size_bytes:,} bytes; give a little more")

    def _limits(self, budget: Budget, items: Sequence[Item], fixed: int) -> list[Limit]:
        """Of bits and of bytes, `fixed` of which are not of weights that are planned."""
        found = []
        if budget.bits is not None:
            weights = sum(math.prod(self.weights[n].shape) for i in items for n in i.names if n in self.candidates)
            most = math.floor(budget.bits * weights + 1e-6)
            found.append(Limit("bits", most, unit="bits a weight", told_per=weights))
        if budget.size_bytes is not None:
            found.append(Limit("size", budget.size_bytes, fixed, unit="bytes"))
        return found

    def _solved(
        self, items: Sequence[Item], chosen: Chosen, memory: MemoryAmounts | None, latency: LatencyAmounts | None
    ) -> Solved:
        picked = {n: item.candidates[j].name for item, j in zip(items, chosen.index, strict=True) for n in item.names}
        schemes = {n: s for n, s in picked.items() if isinstance(s, Scheme)}
        cache = None if memory is None else pairs_in(picked)
        return Solved(
            self.plan_with(schemes),
            chosen,
            schemes,
            cache,
            None if memory is None or cache is None else memory.total(schemes, cache),
            None if latency is None else latency.tokens_per_second(schemes),
        )

    def _memory_amounts(self, budget: Budget) -> MemoryAmounts | None:
        if budget.memory_bytes is None:
            return None
        if budget.context is not None:
            positions = getattr(self.skeleton.model.config, "max_position_embeddings", None)
            if isinstance(positions, int) and budget.context > positions:
                raise PlanError(f"--context {budget.context}: {self.source.path} has {positions} positions")
        if self.cache is None:
            raise PlanError("a plan for memory shares it with the cache, whose sensitivities were not measured")
        return MemoryAmounts(self.skeleton.model, self.weights, self.cache, budget)

    def _latency_amounts(self, budget: Budget) -> LatencyAmounts | None:
        if budget.tokens_per_second is None:
            return None
        model, told = self.skeleton.model, self.progress
        found = LatencyAmounts(
            model.config,
            {n: w for n, w in self.weights.items() if n not in self.skeleton.tied},
            self.compilation.schemes,
            budget,
            step=lambda text: told(f"times on this machine: {text}", 0, 1),
        )
        found.measure(self.candidates, self.compilation.sizes().quantized_bytes)
        return found

    def _memory_limit(self, memory: MemoryAmounts, items: Sequence[Item]) -> Limit:
        """What a plan takes beside its items is the same for all: taken from the smallest one's."""
        picked, spent = {}, 0.0
        for item in items:
            least = min(item.candidates, key=lambda c: c.amounts["memory"])
            spent += least.amounts["memory"]
            picked.update(dict.fromkeys(item.names, least.name))
        schemes = {n: s for n, s in picked.items() if isinstance(s, Scheme)}
        return memory.limit(schemes, pairs_in(picked), spent)

    def _other_bytes(self) -> int:
        """Of what is not quantized, with a first guess at headers."""
        sizes = self.compilation.sizes()
        return sizes.file_bytes - sizes.quantized_bytes

    def plan_with(self, schemes: Mapping[str, Scheme]) -> Plan:
        """The template with these schemes: the most frequent is the layers', every other weight has a rule."""
        linear = Counter(s for n, s in schemes.items() if self.part(n) == "linear")
        usual = linear.most_common(1)[0][0] if linear else self.template.linear
        if usual is not None and self.skeleton.fold is not None and self.template.linear is not None:
            usual = usual.replace(transforms=self.template.linear.transforms)
        rules = [*self.template.rules]
        rules += [Rule(n, s) for n, s in schemes.items() if s != usual or self.part(n) != "linear"]
        return replace(self.template, linear=usual, rules=tuple(rules))


def _last_part(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _mean(found: Iterable[Expected], parts: Sequence[float]) -> Expected:
    found = list(found)
    return Expected(
        output=sum(p * f.output for p, f in zip(parts, found, strict=True)),
        standard_error=math.sqrt(sum((p * f.standard_error) ** 2 for p, f in zip(parts, found, strict=True))),
        table=statistics.fmean(f.table for f in found),
    )
