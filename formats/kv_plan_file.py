"""The plan of a checkpoint's KV cache: one file beside the weights, `bitpalette_kv.safetensors`.

tensors      layers.N.mean  float32 [kv_heads, head_dim]: what the keys of layer N are centered with
__metadata__ {"bitpalette_kv": JSON}: version, the formats (of all layers, and of single ones), and how they were
             found (`KVCalibration`), with the sensitivities that a plan of other bits is solved from
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save

from ..quant.kv_format import KVError, KVFormat
from ..quant.kv_plan import KVPlan
from .atomic import write_atomically
from .errors import FormatError
from .manifest import MANIFEST_NAME, hash_file, read_manifest, rewrite_manifest
from .safetensors_file import SafetensorsFile

KV_PLAN_NAME = "bitpalette_kv.safetensors"
SUFFIX = ".safetensors"
KV_PLAN_VERSION = 1
"""Raised whenever an older reader would misread what is written."""

_KEY = "bitpalette_kv"
_MEAN = "layers.{}.mean"

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSensitivity(_Strict):
    """What quantizing one layer's cache does to the model.

    errors: {tokens of a sequence: {"k4v2": relative squared error of the attention output behind its projection}}.
    slope_k, slope_v: KL divergence (nats a token) that a unit of that error costs, from keys and from values.
    """

    kv_heads: Size
    head_dim: Size
    head_dim_v: Size
    slope_k: Finite
    slope_v: Finite
    errors: dict[int, dict[str, Finite]]


class Mix(_Strict):
    """One plan by the names of its layers' formats, and its KL divergence in nats a token."""

    formats: list[str]
    predicted: Finite
    measured: Finite


class KVCalibration(_Strict):
    """How a plan was found. model: fingerprint of the checkpoint (`Source.fingerprint`); text: fingerprint of the
    text's bytes. sink_mass: share of all attention on each of the first tokens. sinks_error: {sinks: mean relative
    error of attention output with so many exact tokens}. mixes: random plans, measured to see whether costs add up;
    spearman: rank correlation of predicted and measured over them."""

    model: str
    text: str
    text_name: str
    tokens: Size
    lengths: list[Size]
    layers: dict[int, LayerSensitivity]
    sink_mass: list[Finite] = Field(default_factory=list)
    sinks_error: dict[int, Finite] = Field(default_factory=dict)
    mixes: list[Mix] = Field(default_factory=list)
    spearman: Annotated[float, Field(ge=-1, le=1)] | None = None
    budget: str = ""
    predicted: Finite | None = None


class _Contents(_Strict):
    version: int
    bitpalette_version: str = ""
    default: dict[str, Any]
    layers: dict[int, dict[str, Any]] = Field(default_factory=dict)
    calibration: KVCalibration | None = None


@dataclass(frozen=True, eq=False)
class StoredKVPlan:
    """A plan as it is kept: calibration is None for one that was written by hand."""

    plan: KVPlan
    calibration: KVCalibration | None = None


def kv_plan_path(place: str | os.PathLike[str]) -> Path:
    """The plan file in the folder `place`, or `place` itself where it is a file or is named like one."""
    path = Path(place)
    return path if path.is_file() or path.suffix == SUFFIX else path / KV_PLAN_NAME


def prepare_place(place: str | os.PathLike[str]) -> Path:
    """Make the folder that the plan goes to; returns the plan's path. FormatError where nothing can be written."""
    path = kv_plan_path(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path.parent}: cannot be made: {error.strerror}; choose another place") from error
    if not os.access(path.parent, os.W_OK):
        raise FormatError(f"{path.parent}: is not writable; choose another place for the plan")
    return path


def read_kv_plan(place: str | os.PathLike[str]) -> StoredKVPlan | None:
    """The plan of a folder (None where it has none) or of a file. FormatError for a file that is not one."""
    path = kv_plan_path(place)
    if not path.exists() and Path(place).is_dir():
        return None
    file = SafetensorsFile(path)
    contents = _contents(path, file.metadata)
    try:
        default = KVFormat.from_dict(contents.default)
        layers = {layer: KVFormat.from_dict(values) for layer, values in contents.layers.items()}
    except (KVError, TypeError) as error:
        raise FormatError(f"{path}: {error}; delete the file, or write the plan again") from error
    means = {}
    for name, info in file.tensors.items():
        layer = _layer_of(name)
        if layer is None or info.dtype != torch.float32 or len(info.shape) != 2:
            raise FormatError(
                f"{path}: tensor {name!r} {info.dtype} {list(info.shape)} is no mean of keys; delete the file, or "
                "write the plan again"
            )
        means[layer] = file.read(name)
        if not bool(means[layer].isfinite().all()):
            raise FormatError(f"{path}: tensor {name!r} is not finite; delete the file, or write the plan again")
    return StoredKVPlan(KVPlan(default, layers, means), contents.calibration)


def write_kv_plan(place: str | os.PathLike[str], stored: StoredKVPlan, bitpalette_version: str = "") -> Path:
    """Write the plan into a folder, or as the file `place`; returns its path. A manifest in its folder lists it after.

    Interrupted, the folder has the old plan or the new one, or none that its manifest speaks of.
    """
    path = prepare_place(place)
    contents = _Contents(
        version=KV_PLAN_VERSION,
        bitpalette_version=bitpalette_version,
        default=stored.plan.default.to_dict(),
        layers={layer: form.to_dict() for layer, form in sorted(stored.plan.layers.items())},
        calibration=stored.calibration,
    )
    tensors = {_MEAN.format(layer): t.float().cpu().contiguous() for layer, t in sorted(stored.plan.means.items())}
    content = save(tensors, {_KEY: contents.model_dump_json()})
    listed = (path.parent / MANIFEST_NAME).is_file()
    if listed:  # a file of another size than the manifest's would make the checkpoint incomplete
        manifest = read_manifest(path.parent)
        if manifest.files.pop(path.name, None) is not None:
            rewrite_manifest(path.parent, manifest)
    write_atomically(path, content)
    if listed:
        manifest.files[path.name] = hash_file(path)
        rewrite_manifest(path.parent, manifest)
    return path


def _contents(path: Path, metadata: Mapping[str, str]) -> _Contents:
    text = metadata.get(_KEY)
    if text is None:
        raise FormatError(f"{path}: no plan of a KV cache: its metadata has no {_KEY!r}; give a {KV_PLAN_NAME}")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{path}: the plan is no JSON ({error}); delete the file, or write the plan again") from error
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > KV_PLAN_VERSION:
        raise FormatError(
            f"{path}: written by a newer bitpalette (plan {version}, this one reads up to {KV_PLAN_VERSION}); upgrade "
            "bitpalette"
        )
    try:
        return _Contents.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{path}: {place or 'plan'}: {first['msg']}; delete the file, or write the plan again"
        ) from error


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdecimal() and parts[2] == "mean":
        return int(parts[1])
    return None
