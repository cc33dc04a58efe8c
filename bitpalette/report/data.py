"""Everything that the report of a checkpoint shows, gathered from the files beside its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..calibrate.reproduction import REPORT, calibration_text, reproduction
from ..calibrate.weight_kinds import PARTS, block_of, kinds_of, part_of
from ..formats.config_json import read_json
from ..formats.errors import FormatError
from ..formats.native import NativeSource, open_native
from ..formats.plan_file import PLAN_NAME, StoredPlan, plan_beside
from .histogram import Histogram

PARETO_NAME = "pareto.json"

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ParetoPoint(BaseModel):
    """One plan of several. bits: a weight; predicted, measured: KL in nats a token."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: Amount
    bytes: Annotated[int, Field(ge=0)] | None = None
    predicted: Amount | None = None
    measured: Amount | None = None


@dataclass(frozen=True)
class WeightRow:
    """One quantized weight. block: None outside the blocks. error: relative squared error of the layer's output (of the
    weight, where nothing was calibrated). alpha: KL (nats a token) that noise as large as the weight would cost.
    predicted: KL that its scheme is expected to cost."""

    name: str
    block: int | None
    kind: str
    part: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    bytes: int
    error: float | None = None
    alpha: float | None = None
    alpha_se: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Missing:
    """What the page cannot show, and what would bring it."""

    what: str
    command: str


@dataclass(frozen=True)
class ReportData:
    """parts: {part: bytes} of the weight files, `weight_kinds.PARTS`; tied: the embedding table is the head as well.
    source_bytes: of the original's weight files, where known. notes: what a reader should know before believing."""

    name: str
    architecture: str
    method: str
    calibration: str
    written_by: str
    weights: tuple[WeightRow, ...]
    parts: Mapping[str, int]
    tied: bool
    file_bytes: int
    source_bytes: int | None
    bits: float
    file_bits: float
    calibrated: bool
    python: str
    plan: StoredPlan | None = None
    pareto: tuple[ParetoPoint, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def worst(self, count: int = 10) -> list[tuple[WeightRow, float]]:
        """The weights that cost most: (weight, share of the whole predicted KL), falling; by error, with a share of
        NaN, where nothing was predicted."""
        predicted = [w for w in self.weights if w.predicted is not None]
        whole = sum(w.predicted or 0.0 for w in predicted)
        if whole > 0:
            predicted.sort(key=lambda w: -(w.predicted or 0.0))
            return [(w, (w.predicted or 0.0) / whole) for w in predicted[:count]]
        known = sorted((w for w in self.weights if w.error is not None), key=lambda w: -(w.error or 0.0))
        return [(w, math.nan) for w in known[:count]]


def gather(checkpoint: Path, pareto: Path | None = None) -> ReportData:
    """Read what lies beside the weights of a packed checkpoint; the weights themselves are not read.

    pareto: a file of points; None: `pareto.json` in the folder, where there is one. FormatError: not a complete packed
    checkpoint, or a file that is damaged or of another model.
    """
    source = open_native(checkpoint)
    report = read_json(checkpoint / REPORT) if (checkpoint / REPORT).exists() else {}
    job, origin = _mapping(report, "job"), _mapping(report, "source")
    plan = plan_beside(checkpoint)
    if plan is not None and plan.model and job.get("model") and plan.model != job["model"]:
        raise FormatError(
            f"{checkpoint / PLAN_NAME}: a plan for the model {plan.model[:12]}, the checkpoint is of "
            f"{str(job['model'])[:12]}; delete it, or copy the right one there"
        )
    weights = _weights(source, _records(checkpoint, report), plan)
    quantized = sum(math.prod(w.shape) for w in weights)
    return ReportData(
        name=str(origin.get("name") or checkpoint.resolve().name),
        architecture=str((source.config.get("architectures") or ["unknown"])[0]),
        method=_method(weights, _mapping(job, "plan")),
        calibration=calibration_text(job.get("calibration")) if job else "not recorded",
        written_by=source.quantization.bitpalette_version,
        weights=weights,
        parts=_parts(source, weights),
        tied=bool(source.config.get("tie_word_embeddings")),
        file_bytes=source.size_bytes,
        source_bytes=origin.get("bytes") if isinstance(origin.get("bytes"), int) else None,
        bits=8 * sum(w.bytes for w in weights) / quantized if quantized else 16.0,
        file_bits=8 * source.size_bytes / max(1, sum(math.prod(t.shape) for t in source.tensors.values())),
        calibrated=job.get("calibration") is not None,
        python=reproduction(job) if job else "",
        plan=plan,
        pareto=read_pareto(pareto or checkpoint / PARETO_NAME) if pareto or (checkpoint / PARETO_NAME).exists() else (),
        notes=_notes(weights, plan),
    )


def read_pareto(path: Path) -> tuple[ParetoPoint, ...]:
    """Points by rising bits. FormatError where the file is no list of them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        points = TypeAdapter(list[ParetoPoint]).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise FormatError(f"{path}: {place}: {first['msg']}; `quantize pareto` writes it again") from None
    return tuple(sorted(points, key=lambda p: p.bits))


def what_is_missing(data: ReportData, against: bool) -> tuple[Missing, ...]:
    """against: whether histograms were asked for."""
    plan, found = data.plan, []
    if not any(w.error is not None for w in data.weights):
        found.append(Missing(f"errors of layers ({REPORT})", "quantize run MODEL OUT"))
    if plan is None:
        found.append(
            Missing(
                f"predictions, sensitivities, rounds of refinement ({PLAN_NAME})", "quantize run MODEL OUT --bits 3.25"
            )
        )
    elif plan.measured is None:
        found.append(Missing("measured KL and perplexity", f"quantize eval {data.name} --against MODEL"))
    if not data.pareto:
        found.append(Missing(f"quality against size ({PARETO_NAME})", "quantize pareto MODEL --bits 2,2.5,3,4"))
    if not against:
        found.append(Missing("histograms of weights", "quantize report CHECKPOINT --against MODEL"))
    return tuple(found)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _records(checkpoint: Path, report: Mapping[str, Any]) -> dict[str, float]:
    """{parameter: recorded error}."""
    errors = {}
    for number, record in enumerate(report.get("layers", [])):
        try:
            value = float(record["error"])
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"error {value}")
            errors[str(record["parameter"])] = value
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{checkpoint / REPORT}: layers.{number}: {error!r}; write it again") from None
    return errors


def _weights(source: NativeSource, errors: Mapping[str, float], plan: StoredPlan | None) -> tuple[WeightRow, ...]:
    names = source.quantized_names
    kinds = kinds_of(names)
    rows = []
    for name in names:
        info = source.tensors[name]
        planned = plan.weights.get(name) if plan is not None else None
        rows.append(
            WeightRow(
                name=name,
                block=block_of(name),
                kind=kinds[name],
                part=planned.part if planned is not None else part_of(name),
                shape=info.shape,
                scheme=str(source.quantization.scheme_of(name)),
                bits=8 * info.nbytes / math.prod(info.shape),
                bytes=info.nbytes,
                error=errors.get(name),
                alpha=None if planned is None else planned.alpha,
                alpha_se=None if planned is None else planned.alpha_se,
                predicted=None if planned is None else planned.predicted,
            )
        )
    return tuple(sorted(rows, key=lambda w: (w.block is None, w.block or 0)))


def _parts(source: NativeSource, weights: tuple[WeightRow, ...]) -> dict[str, int]:
    """{part: bytes}; headers and alignment of the files are under "other"."""
    parts = dict.fromkeys(PARTS, 0)
    known = {w.name: w.part for w in weights}
    for name, info in source.tensors.items():
        part = known.get(name) or (part_of(name) if len(info.shape) > 1 else "other")
        parts[part] += info.nbytes
    parts["other"] += source.size_bytes - sum(parts.values())
    return {part: n for part, n in parts.items() if n > 0}


def _method(weights: tuple[WeightRow, ...], rounding: Mapping[str, Any]) -> str:
    """ "trellis codes, rounded by ldlq, then tuned" """
    codecs = list(dict.fromkeys(w.scheme.split()[0] for w in weights))
    schemes = len({w.scheme for w in weights if w.part == "linear"})
    words = [" and ".join(codecs) or "16 bits", f"{schemes} schemes among the layers" if schemes > 1 else ""]
    words.append(f"solver {rounding['solver']}" if rounding.get("solver") else "")
    words += [name for key, name in (("fold", "rotation folded"), ("tune", "tuned")) if rounding.get(key)]
    return ", ".join(word for word in words if word)


def _notes(weights: tuple[WeightRow, ...], plan: StoredPlan | None) -> tuple[str, ...]:
    if plan is None or not plan.weights:
        return ()
    other = [w.name for w in weights if w.name not in plan.weights or plan.weights[w.name].scheme != w.scheme]
    if not other:
        return ()
    return (
        f"{len(other)} of {len(weights)} weights are stored otherwise than {PLAN_NAME} says (one is {other[0]}): its "
        "predictions are of another plan.",
    )
