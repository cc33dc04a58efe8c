"""A plan as a file: `quantization_plan.json` beside a checkpoint, or one of its own that a person reads and edits.

Of an edited file only "plan" counts; what was predicted for it is then no longer said of it (`quantize run --plan`
compares the two).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .atomic import write_atomically
from .errors import FormatError

PLAN_NAME = "quantization_plan.json"
PLAN_VERSION = 1
"""Raised whenever an older reader would misread what is written."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Part = Literal["linear", "head", "embedding"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetValues(_Strict):
    """What was asked for, None where nothing was. bits: average over the weights that are quantized, scales counted;
    size_bytes: of the file; memory_bytes: of a process that serves `batch` rows of `context` tokens."""

    bits: Amount | None = None
    size_bytes: Count | None = None
    memory_bytes: Count | None = None
    context: Count | None = None
    batch: Count = 1
    tokens_per_second: Amount | None = None
    device: str | None = None


class PlannedWeight(_Strict):
    """bits: stored, scales counted; bytes likewise. alpha: KL divergence (nats a token) of white noise as large as the
    weight itself, with its standard error; share: of that, what the scheme leaves; predicted: the product."""

    part: Part
    shape: list[Count]
    bits: Amount
    bytes: Count
    scheme: str
    alpha: Amount
    alpha_se: Amount
    share: Amount
    predicted: Amount


class PlannedCache(_Strict):
    """Of a layer's KV cache. bytes: at the budget's context and batch."""

    format: str
    bytes: Count
    predicted: Amount


class PlanBytes(_Strict):
    """Stored bytes by part; other: what stays in 16 bits; cache and memory only where a context was given."""

    linear: Count
    head: Count
    embedding: Count
    other: Count
    file: Count
    cache: Count = 0
    memory: Count | None = None


class Prediction(_Strict):
    """kl: nats a token, with its standard error; seconds: that quantizing will take here."""

    kl: Amount
    kl_se: Amount
    perplexity: Amount | None = None
    reference_perplexity: Amount | None = None
    seconds: Amount | None = None
    tokens_per_second: Amount | None = None


class SolverNotes(_Strict):
    """gap: how much cheaper another plan could be at most, nats a token by the same predictions."""

    seconds: Amount
    gap: Amount
    bound: Finite
    exact: bool
    candidates: Count
    items: Count


class Round(_Strict):
    """One look at true KL divergences. predicted: for the plan as it then was; bought: how much less the plan solved
    after it is measured to have."""

    predicted: Amount
    measured: Amount
    measured_se: Amount
    bought: Finite = 0.0
    corrections: dict[str, Amount] = Field(default_factory=dict)


class Measured(_Strict):
    """What the written checkpoint has; text_name, tokens: where it was looked at."""

    kl: Finite
    kl_se: Amount
    perplexity: Amount
    reference_perplexity: Amount | None = None
    top1: Amount
    text_name: str
    tokens: Count


class StoredPlan(_Strict):
    """plan: `calibrate.plan.Plan.to_dict`. cache: {layer: its format}, None where the cache was not planned."""

    format_version: Literal[1] = 1
    bitpalette_version: str = ""
    command: str = ""
    model: str
    text: str
    text_name: str
    tokens: Count
    effort: str = "normal"
    budget: BudgetValues
    plan: dict[str, Any]
    weights: dict[str, PlannedWeight]
    cache: dict[int, PlannedCache] | None = None
    bytes: PlanBytes
    bits_per_weight: Amount
    predicted: Prediction
    solver: SolverNotes
    rounds: list[Round] = Field(default_factory=list)
    contexts: dict[str, Count] = Field(default_factory=dict)
    measured: Measured | None = None


def encoded(stored: StoredPlan) -> bytes:
    """The file's bytes."""
    return (stored.model_dump_json(indent=1) + "\n").encode()


def write_plan(path: Path, stored: StoredPlan) -> None:
    """`path` is complete or as it was before."""
    write_atomically(path, encoded(stored))


def read_plan(path: Path) -> StoredPlan:
    """FormatError, in one line, for a file that is missing, damaged, or written by a newer version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}; `quantize plan` writes such files") from None
    except ValueError as error:
        raise FormatError(f"{path}: is no JSON ({error}); mend it, or plan anew") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > PLAN_VERSION:
        raise FormatError(
            f"{path}: written by a newer bitpalette (plan {version}, this one reads up to {PLAN_VERSION}); upgrade "
            "bitpalette"
        )
    try:
        return StoredPlan.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path}: {place or 'plan'}: {first['msg']}; mend it, or plan anew") from None


def plan_beside(folder: Path) -> StoredPlan | None:
    """The plan in a checkpoint's folder, None where it has none. FormatError as `read_plan`."""
    path = folder / PLAN_NAME
    return read_plan(path) if path.exists() else None
