"""Sensitivities of a model's weights as an artifact: one safetensors file, measured once, used for any number of plans.

tensors      "<parameter>:rows"  float32 [out_features], of stacked experts [experts, out_features]; [0] for a table of
                                 embeddings that is not also the head
__metadata__ {"bitpalette_sensitivities": JSON}: version, what they were measured on (fingerprints of model and text,
             tokens, seed, dtype), how ("fisher" or "noise"), and for every parameter alpha with its standard error

What the numbers mean: calibrate/sensitivity.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from .atomic import write_atomically
from .errors import FormatError
from .safetensors_file import SafetensorsFile

SENSITIVITY_VERSION = 1
"""Raised whenever an older reader would misread what is written."""

Method = Literal["fisher", "noise"]

_KEY = "bitpalette_sensitivities"
_ROWS = ":rows"
_REMEDY = "delete the file and measure again"

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """KL divergence (nats a token) from the original model that changes of one weight cost.

    alpha: of row-wise white noise whose energy equals the weight's; noise of relative energy t^2 costs alpha t^2.
    rows: float32 [out_features] or [experts, out_features]: a change D costs
        0.5 sum_o rows[o] (D_o H D_o^T) / tr(H), H the mean of x x^T over the layer's inputs x. Empty for a table of
        embeddings, which has no inputs.
    embedding_alpha: alpha of the table of input embeddings; of a weight that is head and embeddings (tied), beside
        `alpha` and `rows`, which are the head's.
    alpha_se, embedding_alpha_se: standard errors over the sequences.
    """

    alpha: float
    alpha_se: float
    rows: Tensor
    embedding_alpha: float = 0.0
    embedding_alpha_se: float = 0.0


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Sensitivities by parameter name, and what they were measured on.

    model: `Source.fingerprint()`. calibration: `Calibration.fingerprint()`. tokens = sequences * seq_len. dtype: what
    the model was computed in, "float32". noise_energy: t^2 of the noise, for method "noise".
    """

    weights: Mapping[str, Sensitivity]
    model: str
    calibration: str
    sequences: int
    seq_len: int
    seed: int
    dtype: str
    method: Method = "fisher"
    noise_energy: float | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Entry(_Strict):
    alpha: Finite
    alpha_se: Finite
    embedding_alpha: Finite = 0.0
    embedding_alpha_se: Finite = 0.0


class _Contents(_Strict):
    format_version: int
    model: str
    calibration: str
    tokens: Size
    sequences: Size
    seq_len: Size
    seed: int
    dtype: str
    method: Method
    noise_energy: Finite | None = None
    weights: dict[str, _Entry]


def write_sensitivities(path: str | os.PathLike[str], sensitivities: Sensitivities) -> None:
    """Write the file, whole or not at all. FormatError where the system refuses, or for values that are not finite or
    negative."""
    path, s = Path(path), sensitivities
    try:
        contents = _Contents(
            format_version=SENSITIVITY_VERSION,
            model=s.model,
            calibration=s.calibration,
            tokens=s.tokens,
            sequences=s.sequences,
            seq_len=s.seq_len,
            seed=s.seed,
            dtype=s.dtype,
            method=s.method,
            noise_energy=s.noise_energy,
            weights={
                name: _Entry(
                    alpha=one.alpha,
                    alpha_se=one.alpha_se,
                    embedding_alpha=one.embedding_alpha,
                    embedding_alpha_se=one.embedding_alpha_se,
                )
                for name, one in s.weights.items()
            },
        )
    except ValidationError as error:
        raise FormatError(f"{path}: not written: {_first(error)}; measure again, in float32") from error
    rows = {name: one.rows.detach().float().cpu().contiguous() for name, one in s.weights.items()}
    for name, values in rows.items():
        if not _valid(values):
            raise FormatError(f"{path}: not written: rows of {name} are negative or not finite; measure again")
    tensors = {name + _ROWS: values for name, values in rows.items()}
    write_atomically(path, save(tensors, {_KEY: contents.model_dump_json()}))


def read_sensitivities(path: str | os.PathLike[str], expected_fingerprint: str | None = None) -> Sensitivities:
    """What `write_sensitivities` wrote. FormatError for another file, a damaged one, or one of another model than that
    with the fingerprint `expected_fingerprint`."""
    path = Path(path)
    file = SafetensorsFile(path)
    contents = _contents(path, file.metadata)
    if expected_fingerprint is not None and contents.model != expected_fingerprint:
        raise FormatError(
            f"{path}: sensitivities of another model (fingerprint {contents.model[:12]}, this model has "
            f"{expected_fingerprint[:12]}); name another file, or delete this one and measure again"
        )
    rows = {}
    for key, info in file.tensors.items():
        name = key.removesuffix(_ROWS)
        if name == key or name not in contents.weights or info.dtype != torch.float32 or len(info.shape) not in (1, 2):
            raise FormatError(f"{path}: tensor {key!r} {info.dtype} {list(info.shape)} is no row of sensitivities of "
                              f"a weight it names; {_REMEDY}")  # fmt: skip
        rows[name] = file.read(key)
        if not _valid(rows[name]):
            raise FormatError(f"{path}: tensor {key!r} is negative or not finite; {_REMEDY}")
    for name in contents.weights:
        if name not in rows:
            raise FormatError(f"{path}: tensor {name + _ROWS!r} is missing; {_REMEDY}")
    return Sensitivities(
        weights={
            name: Sensitivity(
                entry.alpha,
                entry.alpha_se,
                rows[name],
                entry.embedding_alpha,
                entry.embedding_alpha_se,
            )
            for name, entry in contents.weights.items()
        },
        model=contents.model,
        calibration=contents.calibration,
        sequences=contents.sequences,
        seq_len=contents.seq_len,
        seed=contents.seed,
        dtype=contents.dtype,
        method=contents.method,
        noise_energy=contents.noise_energy,
    )


def _contents(path: Path, metadata: Mapping[str, str]) -> _Contents:
    text = metadata.get(_KEY)
    if text is None:
        raise FormatError(f"{path}: holds no sensitivities: its metadata has no {_KEY!r}; name another file")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its metadata is no JSON ({error}); {_REMEDY}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SENSITIVITY_VERSION:
        raise FormatError(
            f"{path}: written by a newer bitpalette (sensitivities {version}, this one reads up to "
            f"{SENSITIVITY_VERSION}); upgrade bitpalette"
        )
    try:
        contents = _Contents.model_validate(values)
    except ValidationError as error:
        raise FormatError(f"{path}: {_first(error)}; {_REMEDY}") from error
    if contents.tokens != contents.sequences * contents.seq_len:
        raise FormatError(
            f"{path}: {contents.tokens} tokens are not {contents.sequences} sequences of {contents.seq_len}; {_REMEDY}"
        )
    return contents


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place or 'sensitivities'}: {first['msg']}"


def _valid(rows: Tensor) -> bool:
    return bool((rows.isfinite() & (rows >= 0)).all())
