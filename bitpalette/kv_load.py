"""What `--kv` and `load(kv=...)` mean: a plan for the cache from a few letters and the plan beside the weights.

plan        the checkpoint's plan (what loading does by itself)
k4v4, 4     one format for all layers; sinks, window and the means of keys stay those of the checkpoint's plan
auto:3.25   solved again for so many bits an element, from the sensitivities kept in the plan
16          no packed cache
...@PLACE   the same with the plan of another folder, or a plan file
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from .calibrate.kv_allocate import within_bits
from .formats.kv_plan_file import KV_PLAN_NAME, StoredKVPlan, read_kv_plan
from .kv_cache import PACKED
from .quant.kv_format import KVError, KVFormat
from .quant.kv_plan import KVPlan

STORED = "plan"
OFF = "16"
AUTO = "auto:"


def plan_from_spec(spec: str | None, directory: str | Path | None, config: Any = None) -> KVPlan | None:
    """The plan that `spec` (see above) names for the checkpoint in `directory`; None: the cache stays as it is.

    spec None: the checkpoint's plan, where it has one. config: of the model, to check the plan's layers against.
    KVError for a spec that says nothing, or asks for what the checkpoint does not have; FormatError for a plan file
    that cannot be read.
    """
    stored = stored_from_spec(spec, directory, config)
    return None if stored is None else stored.plan


def stored_from_spec(spec: str | None, directory: str | Path | None, config: Any = None) -> StoredKVPlan | None:
    """As `plan_from_spec`, with how the checkpoint's plan was found."""
    name, at, place = (spec or "").strip().partition("@")
    if at and not Path(place).exists():
        raise KVError(f"--kv {spec}: there is no {place!r}; give a folder with {KV_PLAN_NAME}, or such a file")
    name = name.lower()
    folder = place if at else directory
    if folder is not None and not Path(folder).exists():  # a hub id
        folder = None
    if name == OFF:
        return None
    stored = None if folder is None else read_kv_plan(folder)
    if spec is None and stored is None:
        return None
    found = _resolve(name, stored, folder, spec)
    if config is not None:
        found.plan.check(packed_layers(config))
    return found


def _resolve(name: str, stored: StoredKVPlan | None, folder: str | Path | None, spec: str | None) -> StoredKVPlan:
    where = "this checkpoint" if folder is None else folder
    if name in ("", STORED):
        if stored is None:
            raise KVError(f"--kv {spec}: {where} has no {KV_PLAN_NAME}; write one with `quantize plan-kv`")
        return stored
    if name.startswith(AUTO):
        bits = _bits(name, spec)
        if stored is None or stored.calibration is None:
            lacks = f"has no {KV_PLAN_NAME}" if stored is None else "has a plan without sensitivities"
            raise KVError(
                f"--kv {spec} is solved from measured sensitivities, and {where} {lacks}; run `quantize plan-kv` on it"
            )
        pairs = within_bits(stored.calibration.layers, bits).pairs
        return StoredKVPlan(with_pairs(stored.plan, pairs), stored.calibration)
    if name.startswith("auto"):
        raise KVError(f"--kv {spec}: say how many bits an element, as in {AUTO}3.25")
    if stored is None:
        return StoredKVPlan(KVPlan(KVFormat.parse(name)))
    exact = stored.plan.default
    form = KVFormat.parse(name, sinks=exact.sinks, window=exact.window)
    means = stored.plan.means if form.kind == "token" else {}
    return StoredKVPlan(KVPlan(form, means=means), stored.calibration)


def _bits(name: str, spec: str | None) -> float:
    try:
        bits = float(name.removeprefix(AUTO))
    except ValueError:
        bits = float("nan")
    if not 2 < bits <= 16:
        raise KVError(f"--kv {spec}: bits an element are above 2 and at most 16, as in {AUTO}3.25")
    return bits


def with_pairs(plan: KVPlan, pairs: Mapping[int, tuple[int, int]]) -> KVPlan:
    """The plan with other bits of keys and values in some layers; everything else stays."""
    layers = {
        layer: dataclasses.replace(plan.format_of(layer), bits_k=keys, bits_v=values)
        for layer, (keys, values) in pairs.items()
    }
    return KVPlan(plan.default, {**plan.layers, **layers}, plan.means)


def packed_layers(config: Any) -> list[int]:
    """The layers of a model that attend to all tokens and own their keys."""
    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [i for i, kind in enumerate(types) if kind == PACKED]
