"""True KL divergences of plans, and what they teach: step 5 of planning.py.

A plan and, for every kind of weight, the same plan with less for that kind are measured in one pass. By how much each
of these is worse, against what was predicted, corrects the kind's price: it holds what second order and independence
leave out. What remains, and grows at low rates, is one factor for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .calibrate.expected_error import gaussian_error
from .calibrate.measure_plan import Measurement, Rounded, difference, measure_plans
from .calibrate.text import held_out_sequences
from .calibrate.whole import load_tokenizer
from .formats.plan_file import Round
from .plan_budget import Budget
from .planning import Planner, Solved
from .quant.scheme import Scheme
from .quant.solver import quantize_tensor
from .quant.stats import Stats
from .quant.tensor import stack, stored_bytes
from .quant.trellis import TrellisScheme

WINDOW = 12
"""Of trellis codes while divergences are measured: factors are the same for all, and it is searched quickest."""

SWAP_BITS = 0.5
"""By which a kind of weight gets less in a measured swap: enough to stand out of the sample's noise."""

FACTOR_LIMITS = (0.33, 3.0)

POWERS = (0.5, 1.0)
"""Of the correction: all of it is too much where a kind's error grows faster than its price, which a swap cannot tell
from a price that is too low."""


@dataclass
class Refinement:
    """planner: measured. Its factors and scale are changed by what is learnt."""

    planner: Planner

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [sequences, seq_len] that divergences are measured on; none are needed where nothing is refined."""
        p = self.planner
        count = max(2, p.refine_tokens // p.calibration.seq_len)
        return held_out_sequences(p.calibration, load_tokenizer(p.source), count)

    def refine(self, budget: Budget, rounds: int) -> tuple[Solved, list[Round]]:
        """Solve, measure, correct, solve again, `rounds` times. Of what is solved again with parts of the correction,
        and the plan before, each round keeps the one with the least true divergence."""
        p, told = self.planner, list[Round]()
        solved = p.solve(budget)
        for _ in range(rounds):
            schemes = self.quick(solved)
            swaps = self._swaps(schemes)
            base, *found = self.measured([schemes, *swaps.values()])
            predicted, before = self.predicted(schemes), dict(p.factors)
            steps = self._steps(schemes, base, swaps, found)
            trials = [(before, solved)]
            for power in POWERS:
                p.factors = before | {kind: before.get(kind, 1.0) * step**power for kind, step in steps.items()}
                trials.append((dict(p.factors), p.solve(budget)))
            looked = [base, *self.measured([self.quick(s) for _, s in trials[1:]])]
            best = min(range(len(trials)), key=lambda i: looked[i].kl)
            p.factors, solved = trials[best]
            self._agree(solved, looked[best])
            told.append(
                Round(
                    predicted=predicted,
                    measured=base.kl,
                    measured_se=base.standard_error,
                    bought=difference(base, looked[best])[0],
                    corrections={kind: round(factor, 4) for kind, factor in p.factors.items()},
                )
            )
        return solved, told

    def _steps(
        self,
        schemes: Mapping[str, Scheme],
        base: Measurement,
        swaps: Mapping[str, Mapping[str, Scheme]],
        found: Sequence[Measurement],
    ) -> dict[str, float]:
        """{kind: by how much its swap is worse than predicted, relative to all kinds together}."""
        predicted = self.predicted(schemes)
        expected = {kind: self.predicted(swap) - predicted for kind, swap in swaps.items()}
        true = {kind: difference(m, base)[0] for kind, m in zip(swaps, found, strict=True)}
        common = sum(true.values()) / max(sum(expected.values()), 1e-30)
        low, high = FACTOR_LIMITS
        return {
            kind: min(max(true[kind] / (expected[kind] * common), low), high)
            for kind in swaps
            if expected[kind] > 0 and common > 0
        }

    def _agree(self, solved: Solved, measured: Measurement) -> None:
        """Predictions of this plan become what was measured."""
        p = self.planner
        p.scale *= measured.kl / self.predicted(self.quick(solved))
        p.reference_perplexity = measured.reference_perplexity
        if measured.kl > 0:
            p.perplexity_slope = math.log(measured.perplexity / measured.reference_perplexity) / measured.kl

    def front(self, budgets: Sequence[Budget]) -> list[dict[str, float]]:
        """A plan for each budget, all measured in one pass: bits, bytes, predicted, measured, measured_se; predicted:
        with the codes that were measured (`WINDOW`)."""
        solved = [self.planner.solve(budget) for budget in budgets]
        found = self.measured([self.quick(s) for s in solved])
        points = []
        for s, measured in zip(solved, found, strict=True):
            sizes = self.planner.compiled(s.plan).sizes()
            points.append(
                {
                    "bits": sizes.bits_per_weight,
                    "bytes": sizes.file_bytes,
                    "predicted": self.predicted(self.quick(s)),
                    "measured": measured.kl,
                    "measured_se": measured.standard_error,
                }
            )
        return points

    def quick(self, solved: Solved) -> dict[str, Scheme]:
        """The plan's schemes as they are coded here."""
        return {n: quick(s) for n, s in solved.schemes.items()}

    def predicted(self, schemes: Mapping[str, Scheme]) -> float:
        """Of schemes as `quick` gives them."""
        total = 0.0
        for name, scheme in schemes.items():
            own = next(s for s in self.planner.candidates[name] if quick(s) == scheme)
            worse = 1.0 if own == scheme else gaussian_error(scheme) / gaussian_error(own)
            total += self.planner.cost(name, own) * worse
        return total

    def _swaps(self, schemes: Mapping[str, Scheme]) -> dict[str, dict[str, Scheme]]:
        """{kind: the same plan with less for this kind}."""
        swaps = {}
        for kind in dict.fromkeys(self.planner.kind(n) for n in schemes):
            swap = dict(schemes)
            for name in schemes:
                if self.planner.kind(name) == kind and name not in self.planner.fixed:
                    swap[name] = self._less(name, schemes[name])
            if swap != schemes:
                swaps[kind] = swap
        return swaps

    def _less(self, name: str, scheme: Scheme) -> Scheme:
        """The candidate nearest to SWAP_BITS below."""
        menu = [quick(s) for s in self.planner.candidates[name]]
        shape = self.planner.weights[name].shape
        bits = {s: 8 * stored_bytes(s, shape) / math.prod(shape) for s in menu}
        wish = 8 * stored_bytes(scheme, shape) / math.prod(shape) - SWAP_BITS
        return min(menu, key=lambda s: abs(bits[s] - wish))

    def measured(self, plans: Sequence[Mapping[str, Scheme]]) -> list[Measurement]:
        """True divergences of {parameter: scheme}, all in one pass over `tokens`."""
        return measure_plans(
            self.planner.skeleton,
            self.planner.weights,
            self.tokens,
            plans,
            self._rounder,
            self.planner.compilation.dtype,
            self.planner.told("true KL divergences"),
        )

    def _rounder(self, index: int | None) -> Rounded:
        stats = self.planner.store.load(
            len(self.planner.skeleton.blocks) if index is None else index, self.planner.skeleton.device
        )

        def rounded(name: str, w: Tensor, scheme: Scheme) -> Tensor:
            conv = self.planner.weights[name].kind == "conv1d"
            solver = self.planner.compilation.solver(name, scheme)
            own = stats.get(name)

            def one(m: Tensor, s: Stats | None) -> Any:
                return quantize_tensor(m, scheme, solver=solver, stats=s, seed=self.planner.template.seed)

            if w.ndim == 3:
                assert isinstance(own, list)
                return stack([one(m, s) for m, s in zip(w, own, strict=True)]).dequantize()
            assert not isinstance(own, list)
            q = one(w.T if conv else w, own).dequantize()
            return q.T.contiguous() if conv else q

        return rounded


def quick(scheme: Scheme) -> Scheme:
    """The form of a scheme that is measured: a trellis with the narrowest window."""
    return scheme.replace(window=WINDOW) if isinstance(scheme, TrellisScheme) else scheme
