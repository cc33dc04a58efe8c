"""How `quantize plan` finds which weight gets which scheme.

1. One pass over calibration text: second moments of every layer's input (kept in the folder of statistics).
2. Sensitivities: what white noise in a weight costs in KL divergence (calibrate/sensitivity.py).
3. What every candidate scheme leaves of it (calibrate/expected_error.py), from the Hessian and a sample of rows.
4. The cheapest choice within the budgets (calibrate/allocate.py).
5. True KL divergences of that plan and of plans that differ from it in one kind of weight; from how far these are from
   what was predicted each kind gets a factor, and 4 is solved again (`refine`).

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
from .calibrate.collect_stats import calibration_tokens, collect_statistics
from .calibrate.compile import Compilation
from .calibrate.expected_error import Expected, expected_errors
from .calibrate.measure_plan import Measurement, Rounded, difference, measure_plans
from .calibrate.plan import Plan, PlanError, Rule
from .calibrate.sensitivity import fisher_sensitivities
from .calibrate.store import LayerStats, StatsStore
from .calibrate.text import Calibration, held_out_sequences
from .calibrate.whole import load_tokenizer
from .formats.base import Source
from .formats.plan_file import (
    BudgetValues,
    PlanBytes,
    PlannedWeight,
    Prediction,
    Round,
    SolverNotes,
    StoredPlan,
)
from .formats.sensitivity_file import Sensitivities, Sensitivity, read_sensitivities, write_sensitivities
from .plan_errors import read_errors, write_errors
from .quant.scheme import Scheme
from .quant.solver import quantize_tensor
from .quant.stats import Stats
from .quant.tensor import stack, stored_bytes
from .quant.trellis import TrellisScheme

SENSITIVITIES = "sensitivities.safetensors"
SENSITIVITY_SEQ_LEN = 256
EXPERTS = 4
"""Of a stack, those with the largest part in alpha, whose rows are sampled."""

REFINE_WINDOW = 12
"""Of trellis codes while true divergences are measured: factors are the same for all, and it is searched quickest."""

SWAP_BITS = 0.5
"""By which a kind of weight gets less in a measured swap: enough to stand out of the sample's noise."""

FACTOR_LIMITS = (0.33, 3.0)

SIZE_ROUNDS = 4
"""Headers of files grow and shrink with the schemes in them: sizes are solved again until they fit."""

VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Weights that vLLM computes as one matrix, so that they must share a scheme."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Budget:
    """At least one of these. bits: average over the weights that are quantized, scales counted; size_bytes: of all
    files."""

    bits: float | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bits is None and self.size_bytes is None:
            raise PlanError("a plan needs a budget: --bits, --size, --memory with --context, or --tokens-per-second")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise PlanError(f"--bits {self.bits:g}: an average of 1 to 8 bits a weight")

    def values(self) -> BudgetValues:
        return BudgetValues(bits=self.bits, size_bytes=self.size_bytes)


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
    effort: str = "normal"
    progress: Progress = lambda phase, done, of: None
    compilation: Compilation = field(init=False)
    sensitivities: Mapping[str, Sensitivity] = field(init=False)
    errors: dict[str, dict[Scheme, Expected]] = field(init=False)
    factors: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    perplexity_slope: float = 1.0
    reference_perplexity: float | None = None

    def __post_init__(self) -> None:
        if self.serve not in (None, "vllm"):
            raise PlanError(f"--serve {self.serve!r}: there is vllm, whose fused weights share a scheme")
        self.compilation = self.compiled(self.template)
        if not self.compilation.schemes:
            raise PlanError(f"{self.source.path}: every weight is kept at 16 bits, nothing is left to plan")
        self.skeleton, self.weights = self.compilation.skeleton, self.compilation.weights
        self.skeleton.use(self.compilation.device)
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
        """The weight's role: the last part of its module's name, the same in every block."""
        return self.part(name) if self.part(name) != "linear" else _role(name)

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
            except ValueError:
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
        if any(not self.store.has(part) for part in range(len(self.skeleton.blocks) + 1)):
            collect_statistics(
                self.skeleton, self.weights, self.store, self._tokens(), dtype, self._told("statistics of inputs")
            )
        self.sensitivities = self._sensitivities(origin)
        self.errors = self._errors()

    def _told(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, of: self.progress(phase, done, of)

    def _tokens(self) -> Tensor:
        if self.tokens is None:
            self.tokens = calibration_tokens(self.source, self.calibration, self.skeleton, self.compilation.dtype)
        return self.tokens

    def _sensitivities(self, origin: Mapping[str, Any]) -> Mapping[str, Sensitivity]:
        path = self.folder / SENSITIVITIES
        length = min(SENSITIVITY_SEQ_LEN, self.calibration.seq_len)
        count = max(2, self.sensitivity_tokens // length)
        if path.exists():
            found = read_sensitivities(path)
            if found.sequences >= count and set(found.weights) >= set(self.compilation.schemes):
                return found.weights
        tokens = self._tokens()
        tokens = tokens[torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).long().unique(), :length]
        weights = {n: self.weights[n] for n in self.weights if not self.weights[n].router}
        measured = fisher_sensitivities(
            self.skeleton, weights, tokens, seed=self.template.seed, progress=self._told("sensitivities")
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

    def items(self) -> list[Item]:
        """What is chosen for, groups that share a scheme as one."""
        items = []
        for names in self._groups():
            menus = [self.candidates[n] for n in names]
            shared = [s for s in menus[0] if all(s in menu for menu in menus[1:])]
            if not shared:
                raise PlanError(f"{names[0]} and {names[1]} share a scheme (--serve), and --set gives them different")
            candidates = []
            for scheme in shared:
                size = sum(stored_bytes(scheme, self.weights[n].shape) for n in names)
                cost = sum(self.cost(n, scheme) for n in names)
                candidates.append(Candidate(scheme, cost, {"bits": 8 * size, "size": size}))
            items.append(Item(tuple(names), tuple(candidates)))
        return items

    def _groups(self) -> list[list[str]]:
        names = list(self.compilation.schemes)
        if self.serve is None:
            return [[name] for name in names]
        groups: dict[tuple[str, int], list[str]] = {}
        for i, name in enumerate(names):
            parent = name.removesuffix(".weight").rpartition(".")[0]
            fused = next((j for j, roles in enumerate(VLLM_FUSED) if _role(name) in roles), None)
            groups.setdefault((parent, fused) if fused is not None else (name, -1 - i), []).append(name)
        return list(groups.values())

    def solve(self, budget: Budget) -> tuple[Plan, Chosen]:
        """The cheapest plan within the budget. PlanError where there is none: by how much, and what the least is."""
        items = self.items()
        weights = sum(math.prod(self.weights[n].shape) for item in items for n in item.names)
        fixed = self._other_bytes()
        extra = 0
        for _ in range(SIZE_ROUNDS):
            limits = []
            if budget.bits is not None:
                limits.append(Limit("bits", math.floor(budget.bits * weights + 1e-6), unit="bits in all weights"))
            if budget.size_bytes is not None:
                limits.append(Limit("size", budget.size_bytes, fixed + extra, unit="bytes"))
            chosen = allocate(items, limits)
            plan = self.plan_of(items, chosen)
            if budget.size_bytes is None:
                return plan, chosen
            over = self.compiled(plan).sizes().file_bytes - budget.size_bytes
            if over <= 0:
                return plan, chosen
            extra += over
        raise PlanError(f"no plan was found whose files have {budget.size_bytes:,} bytes; give a little more")

    def _other_bytes(self) -> int:
        """Of what is not quantized, with a first guess at headers."""
        sizes = self.compilation.sizes()
        return sizes.file_bytes - sizes.quantized_bytes

    def plan_of(self, items: Sequence[Item], chosen: Chosen) -> Plan:
        schemes = {n: item.candidates[j].name for item, j in zip(items, chosen.index, strict=True) for n in item.names}
        return self.plan_with({n: s for n, s in schemes.items() if isinstance(s, Scheme)})

    def plan_with(self, schemes: Mapping[str, Scheme]) -> Plan:
        """The template with these schemes: the most frequent is the layers', every other weight has a rule."""
        linear = Counter(s for n, s in schemes.items() if self.part(n) == "linear")
        usual = linear.most_common(1)[0][0] if linear else self.template.linear
        if usual is not None and self.skeleton.fold is not None and self.template.linear is not None:
            usual = usual.replace(transforms=self.template.linear.transforms)
        rules = [*self.template.rules]
        rules += [Rule(n, s) for n, s in schemes.items() if s != usual or self.part(n) != "linear"]
        return replace(self.template, linear=usual, rules=tuple(rules))

    # --- refining ----------------------------------------------------------------------------------------------------

    def refine(self, budget: Budget, rounds: int) -> tuple[Plan, Chosen, list[Round]]:
        """Solve, look at true KL divergences, correct the predictor, solve again, `rounds` times."""
        plan, chosen = self.solve(budget)
        told: list[Round] = []
        if rounds <= 0:
            return plan, chosen, told
        tokens = self._held_out()
        schemes = self._schemes(plan)
        before: Measurement | None = None
        for _ in range(rounds):
            swaps = self._swaps(schemes)
            found = self._measured([schemes, *swaps.values()], tokens)
            base = found[0]
            predicted = self._predicted(schemes)
            if before is not None and told:
                bought, _ = difference(before, base)
                told[-1] = told[-1].model_copy(update={"bought": bought})
            for kind, swap, measured in zip(swaps, swaps.values(), found[1:], strict=True):
                change, _ = difference(measured, base)
                expected = self._predicted(swap) - predicted
                if expected > 0:
                    low, high = FACTOR_LIMITS
                    step = min(max(change / expected, low), high)
                    self.factors[kind] = self.factors.get(kind, 1.0) * step
            self.scale *= base.kl / self._predicted(schemes)
            self.reference_perplexity = base.reference_perplexity
            if base.kl > 0:
                self.perplexity_slope = math.log(base.perplexity / base.reference_perplexity) / base.kl
            told.append(
                Round(
                    predicted=predicted,
                    measured=base.kl,
                    measured_se=base.standard_error,
                    corrections={k: round(v, 4) for k, v in self.factors.items()},
                )
            )
            before = base
            plan, chosen = self.solve(budget)
            schemes = self._schemes(plan)
        (last,) = self._measured([schemes], tokens)
        assert before is not None
        bought, _ = difference(before, last)
        told[-1] = told[-1].model_copy(update={"bought": bought})
        if bought < 0:  # the text says that the plan before was better: noise, or a predictor that cannot be mended
            told[-1] = told[-1].model_copy(update={"bought": bought})
        self.scale *= last.kl / self._predicted(schemes)
        return plan, chosen, told

    def front(self, budgets: Sequence[Budget]) -> list[dict[str, float]]:
        """A plan for each budget, predicted and measured in one pass: bits, bytes, predicted, measured, measured_se."""
        solved = [self.solve(budget) for budget in budgets]
        found = self._measured([self._schemes(plan) for plan, _ in solved], self._held_out())
        points = []
        for (plan, chosen), measured in zip(solved, found, strict=True):
            sizes = self.compiled(plan).sizes()
            points.append(
                {
                    "bits": sizes.bits_per_weight,
                    "bytes": sizes.file_bytes,
                    "predicted": chosen.cost,
                    "predicted_as_measured": self._predicted(self._schemes(plan)),
                    "measured": measured.kl,
                    "measured_se": measured.standard_error,
                }
            )
        return points

    def _held_out(self) -> Tensor:
        """int64 [sequences, seq_len] of the text that statistics were not taken on, as far as it has such."""
        count = max(2, self.refine_tokens // self.calibration.seq_len)
        return held_out_sequences(self.calibration, load_tokenizer(self.source), count)

    def _schemes(self, plan: Plan) -> dict[str, Scheme]:
        """As they are coded while true divergences are measured."""
        return {n: _quick(s) for n, s in self.compiled(plan).schemes.items()}

    def _swaps(self, schemes: Mapping[str, Scheme]) -> dict[str, dict[str, Scheme]]:
        """{kind: the same plan with less for this kind}."""
        swaps = {}
        for kind in dict.fromkeys(self.kind(n) for n in schemes):
            swap = dict(schemes)
            for name in schemes:
                if self.kind(name) == kind and name not in self.fixed:
                    swap[name] = self._less(name, schemes[name])
            if swap != schemes:
                swaps[kind] = swap
        return swaps

    def _less(self, name: str, scheme: Scheme) -> Scheme:
        """The candidate nearest to SWAP_BITS below."""
        menu = [_quick(s) for s in self.candidates[name]]
        shape = self.weights[name].shape
        bits = {s: 8 * stored_bytes(s, shape) / math.prod(shape) for s in menu}
        wish = 8 * stored_bytes(scheme, shape) / math.prod(shape) - SWAP_BITS
        return min(menu, key=lambda s: abs(bits[s] - wish))

    def _predicted(self, schemes: Mapping[str, Scheme]) -> float:
        """Of schemes as `_schemes` gives them."""
        total = 0.0
        for name, scheme in schemes.items():
            quick = {_quick(s): s for s in self.candidates[name]}
            own = quick[scheme]
            ratio = _quick_ratio(own, scheme)
            total += self.cost(name, own) * ratio
        return total

    def _measured(self, plans: Sequence[Mapping[str, Scheme]], tokens: Tensor) -> list[Measurement]:
        return measure_plans(
            self.skeleton,
            self.weights,
            tokens,
            plans,
            self._rounder,
            self.compilation.dtype,
            self._told("true KL divergences"),
        )

    def _rounder(self, index: int | None) -> Rounded:
        stats = self.store.load(len(self.skeleton.blocks) if index is None else index, self.skeleton.device)

        def rounded(name: str, w: Tensor, scheme: Scheme) -> Tensor:
            conv = self.weights[name].kind == "conv1d"
            solver = self.compilation.solver(name, scheme)
            own = stats.get(name)

            def one(m: Tensor, s: Stats | None) -> Any:
                return quantize_tensor(m, scheme, solver=solver, stats=s, seed=self.template.seed)

            if w.ndim == 3:
                assert isinstance(own, list)
                return stack([one(m, s) for m, s in zip(w, own, strict=True)]).dequantize()
            assert not isinstance(own, list)
            q = one(w.T if conv else w, own).dequantize()
            return q.T.contiguous() if conv else q

        return rounded

    # --- telling -----------------------------------------------------------------------------------------------------

    def stored(
        self, plan: Plan, chosen: Chosen, budget: Budget, rounds: Sequence[Round] = (), command: str = ""
    ) -> StoredPlan:
        compilation = self.compiled(plan)
        schemes, sizes = compilation.schemes, compilation.sizes()
        planned, parts = {}, Counter[str]()
        for name, scheme in schemes.items():
            shape, s = self.weights[name].shape, self.sensitivities[name]
            size = stored_bytes(scheme, shape)
            part = self.part(name)
            parts[part] += size
            cost, alpha = self.cost(name, scheme), s.alpha + s.embedding_alpha
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
        kl = sum(w.predicted for w in planned.values())
        error = math.sqrt(sum(self.variance(n, s) for n, s in schemes.items()))
        if rounds:
            error = math.hypot(error, kl * rounds[-1].measured_se / max(rounds[-1].measured, 1e-12))
        reference = self.reference_perplexity
        return StoredPlan(
            bitpalette_version=__version__,
            command=command,
            model=self.source.fingerprint(),
            text=self.calibration.fingerprint(),
            text_name=Path(self.calibration.text).name,
            tokens=self.calibration.tokens,
            effort=self.effort,
            budget=budget.values(),
            plan=plan.to_dict(),
            weights=planned,
            bytes=PlanBytes(
                linear=parts["linear"],
                head=parts["head"],
                embedding=parts["embedding"],
                other=sizes.file_bytes - sum(parts.values()),
                file=sizes.file_bytes,
            ),
            bits_per_weight=sizes.bits_per_weight,
            predicted=Prediction(
                kl=kl,
                kl_se=error,
                perplexity=None if reference is None else reference * math.exp(self.perplexity_slope * kl),
                reference_perplexity=reference,
            ),
            solver=SolverNotes(
                seconds=chosen.seconds,
                gap=chosen.gap,
                bound=chosen.bound,
                exact=chosen.exact,
                candidates=max(len(menu) for menu in self.candidates.values()),
                items=len(self._groups()),
            ),
            rounds=list(rounds),
        )


def _role(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _quick(scheme: Scheme) -> Scheme:
    return scheme.replace(window=REFINE_WINDOW) if isinstance(scheme, TrellisScheme) else scheme


def _quick_ratio(scheme: Scheme, quick: Scheme) -> float:
    """By how much more error the quick form has."""
    from .calibrate.expected_error import gaussian_error

    return 1.0 if scheme == quick else gaussian_error(quick) / gaussian_error(scheme)


def _mean(found: Iterable[Expected], parts: Sequence[float]) -> Expected:
    found = list(found)
    return Expected(
        output=sum(p * f.output for p, f in zip(parts, found, strict=True)),
        standard_error=math.sqrt(sum((p * f.standard_error) ** 2 for p, f in zip(parts, found, strict=True))),
        table=statistics.fmean(f.table for f in found),
    )
