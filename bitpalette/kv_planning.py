"""How a plan for the KV cache is found: `quantize plan-kv`.

1. One pass over calibration text: the means of keys, and how much attention the first tokens get.
2. Attention output errors with 0 to 16 exact first tokens: how many of them pay.
3. Errors of every pair of bits in every layer, at every length (calibrate/kv_sensitivity.py).
4. What such an error costs in KL divergence: one layer at a time is packed, keys alone and values alone.
5. Random mixes, to see whether the costs of layers add up.
6. The cheapest pairs within the budget (calibrate/kv_allocate.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calibrate.kv_allocate import Allocation, Layers, cost_of, name_of, sinks_that_pay, within_bits, within_bytes
from .calibrate.kv_collect import MOST_SINKS, KeyStatistics, observing, run
from .calibrate.kv_sensitivity import OutputErrors, Pair, candidate_pairs
from .formats.kv_plan_file import KVCalibration, LayerSensitivity, Mix, StoredKVPlan
from .kernels.kv_rows import cache_bytes
from .kv_attention import NAME
from .kv_cache import QuantizedCache
from .kv_load import packed_layers
from .kv_measure import STEP, KLMeasure
from .quant.kv_format import KVError, KVFormat
from .quant.kv_plan import KVPlan

SINKS = (0, 1, 4, 8, MOST_SINKS)
SINKS_PAIR = (3, 3)
"""What numbers of sinks are compared at."""

SLOPE_BITS = 2
"""One side of one layer at these bits is what slopes are measured at. On SmolLM2-135M (1024 tokens) 17 random mixes
then had .99 times the predicted KL (geometric mean; standard deviation of its logarithm .08, Spearman .99); with slopes
at 3 bits .11 and .98, with one slope a layer, at k3v3, .10 and .99."""

MIX_BITS = (8, 4, 3, 2)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class KVBudget:
    """bits: an element on average, gains counted; or size_bytes: of the packed layers of a whole cache for `batch` rows
    of `context` tokens, at the model's own 16 bits for what is not quantized."""

    bits: float | None = 3.25
    size_bytes: int | None = None
    context: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size_bytes is None):
            raise KVError("the budget of a plan is either bits an element or bytes; give one of --bits and --bytes")
        if self.size_bytes is not None and self.context is None:
            raise KVError(f"a budget of {self.size_bytes:,} bytes is for a context; give --context, and --batch")
        if self.batch < 1 or (self.context is not None and self.context < 1):
            raise KVError(f"--context {self.context} and --batch {self.batch} are numbers of 1 or more")

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits an element"
        return f"{self.size_bytes:,} bytes for {self.batch} x {self.context} tokens"

    def allocate(self, layers: Layers, exact: KVFormat) -> Allocation:
        """exact: sinks and window that every layer keeps."""
        if self.size_bytes is None:
            assert self.bits is not None
            return within_bits(layers, self.bits, self.context)

        def bytes_of(layer: LayerSensitivity, pair: Pair) -> int:
            return self.layer_bytes(layer, KVFormat(*pair, sinks=exact.sinks, window=exact.window))

        return within_bytes(layers, self.size_bytes, bytes_of, self.context)

    def layer_bytes(self, layer: LayerSensitivity, form: KVFormat) -> int:
        assert self.context is not None
        return cache_bytes(form, self.context, self.batch, layer.kv_heads, layer.head_dim, layer.head_dim_v)


@dataclass(frozen=True)
class KVText:
    """What to calibrate on: tokens {length: int64 [sequences, length]}; name and fingerprint are kept in the plan."""

    tokens: Mapping[int, Tensor]
    name: str
    fingerprint: str

    @property
    def count(self) -> int:
        return sum(t.numel() for t in self.tokens.values())


@dataclass
class KVPlanner:
    """Measures a model, then solves plans. model: in memory, best in float32, with no plan in use; window: exact last
    tokens; sinks: exact first ones, None: as many as pay; kl_tokens: how many tokens KL divergences are measured on, of
    the longest sequences; mixes: how many random plans check that costs add up.

    KVError for a model whose cache cannot be packed, and where sequences are too short to read anything packed.
    """

    model: Any
    text: KVText
    window: int = 64
    sinks: int | None = None
    kl_tokens: int = 2048
    mixes: int = 8
    seed: int = 0
    progress: Progress = lambda phase, done, of: None
    layers: list[int] = field(init=False)
    exact: KVFormat = field(init=False)
    means: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.exact = KVFormat(sinks=self.sinks or 0, window=self.window)
        QuantizedCache(self.model.config, KVFormat())  # says why not
        self.layers = packed_layers(self.model.config)
        least = MOST_SINKS + self.window + 2 * STEP
        if min(self.text.tokens) < least:
            raise KVError(
                f"sequences of {min(self.text.tokens)} tokens hardly read anything packed beside a window of "
                f"{self.window}; give --lengths of {least} or more"
            )

    def measure(self, model_fingerprint: str) -> KVCalibration:
        """Steps 1 to 5. `means` and `exact` (its sinks and window) are set then."""
        longest = max(self.text.tokens)
        statistics = KeyStatistics(frozenset(self.layers))
        self._observe("means of keys", statistics, self.text.tokens)
        self.means = statistics.means()
        if missing := sorted(set(self.layers) - set(statistics.widths())):
            raise KVError(f"layers {missing} never came to attention; this model's cache cannot be planned")
        pairs = {layer: candidate_pairs(*widths) for layer, widths in statistics.widths().items()}
        every = tuple(dict.fromkeys(pair for of_layer in pairs.values() for pair in of_layer))
        if not every:
            for widths in statistics.widths().values():
                KVFormat().check_head_dim(*widths)  # says why not
        sinks_error = self._choose_sinks(longest) if self.sinks is None else {}
        errors = OutputErrors(frozenset(self.layers), self.means, every, (self.exact.sinks,), self.window)
        self._observe("errors of attention", errors, self.text.tokens)
        tokens = self.text.tokens[longest][: max(1, self.kl_tokens // longest)]
        first = -(-(self.exact.sinks + self.window + 1) // STEP) * STEP
        kl = KLMeasure(self.model, tokens, self.layers, first)
        layers = self._slopes(errors, kl, longest)
        mixes = self._mixes(layers, kl, longest)
        return KVCalibration(
            model=model_fingerprint,
            text=self.text.fingerprint,
            text_name=self.text.name,
            tokens=self.text.count,
            lengths=sorted(self.text.tokens),
            layers=layers,
            sink_mass=statistics.sink_mass(),
            sinks_error=sinks_error,
            mixes=mixes,
            spearman=spearman([m.predicted for m in mixes], [m.measured for m in mixes]),
        )

    def _observe(self, phase: str, observer: Any, tokens: Mapping[int, Tensor]) -> None:
        rows, done = sum(len(t) for t in tokens.values()), 0

        def step() -> None:
            nonlocal done
            done += 1
            self.progress(phase, done, rows)

        self.progress(phase, 0, rows)
        with observing(self.model, observer, NAME):
            run(self.model, tokens, step)

    def _choose_sinks(self, length: int) -> dict[int, float]:
        errors = OutputErrors(frozenset(self.layers), self.means, (SINKS_PAIR,), SINKS, self.window)
        self._observe("sinks", errors, {length: self.text.tokens[length][:1]})
        found = {}
        for sinks in SINKS:
            of_layers = [errors.relative(layer, length, sinks)[name_of(SINKS_PAIR)] for layer in self.layers]
            found[sinks] = sum(of_layers) / len(of_layers)
        self.exact = KVFormat(sinks=sinks_that_pay(found, length), window=self.window)
        return found

    def _slopes(self, errors: OutputErrors, kl: KLMeasure, length: int) -> dict[int, LayerSensitivity]:
        found = {}
        for i, layer in enumerate(self.layers):
            self.progress("KL of single layers", i, len(self.layers))
            measured = {n: errors.relative(layer, n, self.exact.sinks) for n in sorted(self.text.tokens)}
            slopes = []
            for pair in ((SLOPE_BITS, 16), (16, SLOPE_BITS)):
                error = measured[length].get(name_of(pair), 0.0)
                slopes.append(kl(self._plan({layer: pair})) / error if error > 0 else 0.0)
            kv_heads, head_dim, head_dim_v = errors.widths[layer]
            found[layer] = LayerSensitivity(
                kv_heads=kv_heads,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                slope_k=slopes[0],
                slope_v=slopes[1],
                errors=measured,
            )
        self.progress("KL of single layers", len(self.layers), len(self.layers))
        return found

    def _mixes(self, layers: Layers, kl: KLMeasure, length: int) -> list[Mix]:
        """Each has frequencies of bits of its own, so that small and large divergences occur."""
        rng, mixes = random.Random(self.seed), []
        for i in range(self.mixes):
            self.progress("random mixes", i, self.mixes)
            weights = [[rng.random() ** 2 + 0.05 for _ in MIX_BITS] for _ in range(2)]
            pairs = {n: tuple(rng.choices(MIX_BITS, w)[0] for w in weights) for n in layers}
            known = {n: (p[0], p[1]) if name_of((p[0], p[1])) in layers[n].errors[length] else (16, 16)
                     for n, p in pairs.items()}  # fmt: skip
            predicted = sum(cost_of(layers[n], pair, length) for n, pair in known.items())
            names = [name_of(pair) for pair in known.values()]
            mixes.append(Mix(formats=names, predicted=predicted, measured=kl(self._plan(known))))
        self.progress("random mixes", self.mixes, self.mixes)
        return mixes

    def _plan(self, pairs: Mapping[int, Pair]) -> KVPlan:
        """These layers packed, all others dense."""
        return plan_of_pairs(pairs, self.exact, self.means, (16, 16))


def plan_of_pairs(
    pairs: Mapping[int, Pair], exact: KVFormat, means: Mapping[int, Tensor], default: Pair | None = None
) -> KVPlan:
    """A plan with sinks and window of `exact`. default: pair of other layers; None: the most frequent of `pairs`."""

    def form(pair: Pair) -> KVFormat:
        return KVFormat(*pair, sinks=exact.sinks, window=exact.window)

    rest = Counter(pairs.values()).most_common(1)[0][0] if default is None else default
    return KVPlan(form(rest), {layer: form(pair) for layer, pair in pairs.items()}, dict(means))


def solve(measured: StoredKVPlan, budget: KVBudget) -> tuple[StoredKVPlan, Allocation]:
    """The cheapest plan within the budget, from what was measured. KVError where no plan is that small."""
    calibration, exact = measured.calibration, measured.plan.default
    if calibration is None:
        raise KVError("a plan without sensitivities cannot be solved again; run `quantize plan-kv` without it")
    allocation = budget.allocate(calibration.layers, exact)
    plan = plan_of_pairs(allocation.pairs, exact, measured.plan.means)
    told = {"budget": str(budget), "predicted": allocation.predicted}
    return StoredKVPlan(plan, calibration.model_copy(update=told)), allocation


def spearman(a: list[float], b: list[float]) -> float | None:
    """Rank correlation; None for fewer than 3 values, or where all are equal."""
    if len(a) < 3:
        return None
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(-1).argsort(-1).double()
    return float(torch.corrcoef(ranks)[0, 1])
