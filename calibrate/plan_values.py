"""What pages and model cards show of a checkpoint's `quantization_plan.json`: predictions, measurements, budgets.

Only what is shown is read, and checked; the plan itself (schemes and rules) is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..formats.config_json import read_json
from ..formats.errors import FormatError

PLAN_NAME = "quantization_plan.json"
PLAN_VERSION = 1

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PlannedWeight(_Read):
    """alpha: predicted KL (nats a token) of white noise as large as the weight; share: rho, what error feedback leaves
    of the error; predicted: KL that its scheme is expected to cost."""

    part: Literal["linear", "head", "embedding"]
    bits: Amount
    scheme: str
    alpha: Amount | None = None
    alpha_se: Amount | None = None
    share: Amount | None = None
    predicted: Amount | None = None


class Predicted(_Read):
    """kl: nats a token. seconds: of the run. tokens_per_second: of decoding."""

    kl: Amount
    kl_se: Amount | None = None
    perplexity: Amount | None = None
    reference_perplexity: Amount | None = None
    seconds: Amount | None = None
    tokens_per_second: Amount | None = None


class Measured(_Read):
    kl: Amount
    kl_se: Amount | None = None
    perplexity: Amount | None = None
    top1: Annotated[float, Field(ge=0, le=1)] | None = None
    text_name: str = ""
    tokens: Count | None = None


class Round(_Read):
    """One measurement during planning. bought: by how much KL the plan that followed is predicted to be better."""

    predicted: Amount
    measured: Amount
    measured_se: Amount | None = None
    bought: Finite | None = None


class Solved(_Read):
    """gap: how far, in KL, the plan may be from the best there is."""

    seconds: Amount | None = None
    gap: Amount | None = None
    exact: bool | None = None
    candidates: Count | None = None
    items: Count | None = None


class PlanValues(_Read):
    """`quantization_plan.json`, as far as it is shown. contexts: {"4GB": tokens of context that fit}."""

    format_version: int
    command: str = ""
    model: str = ""
    text_name: str = ""
    tokens: Count | None = None
    budget: dict[str, Any] = Field(default_factory=dict)
    weights: dict[str, PlannedWeight] = Field(default_factory=dict)
    bits_per_weight: Amount | None = None
    predicted: Predicted | None = None
    solver: Solved | None = None
    rounds: list[Round] = Field(default_factory=list)
    contexts: dict[str, Count] = Field(default_factory=dict)
    measured: Measured | None = None


def read_plan_values(folder: Path) -> PlanValues | None:
    """Of the plan beside a checkpoint's weights, None where there is none. FormatError: unreadable, of a newer
    version, or a value that cannot be."""
    path = folder / PLAN_NAME
    if not path.exists():
        return None
    values = read_json(path)
    version = values.get("format_version")
    if isinstance(version, int) and version > PLAN_VERSION:  # before anything else: the rest may look different
        raise FormatError(f"{path}: plan of version {version}, this bitpalette reads up to {PLAN_VERSION}; upgrade it")
    try:
        return PlanValues.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path}: {place}: {first['msg']}, got {first['input']!r:.60}; write it again") from None
