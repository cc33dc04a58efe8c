"""A model that makes packed caches by itself: in `generate`, and in a bare forward that keeps a cache.

The plan lives in a forward hook of the model (`CacheMaker`), which `plan_of` finds again; transformers'
`_prepare_cache_for_generation` is replaced on the one model.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import MethodType
from typing import Any

from .formats.kv_plan_file import KVCalibration, StoredKVPlan, read_kv_plan
from .kv_attention import NAME
from .kv_cache import QuantizedCache
from .kv_load import packed_layers, stored_from_spec
from .quant.kv_plan import KVPlan

PREPARE = "_prepare_cache_for_generation"
PAST = "past_key_values"
OPTIONS: dict[str | None, dict[str, bool]] = {None: {}, "static": {"static": True}, "offloaded": {"offloading": True}}
"""Names of transformers' caches -> options of ours."""


class CacheMaker:
    """A forward pre-hook: a forward that would make a cache of its own gets a packed one. Not in training."""

    def __init__(self, plan: KVPlan, calibration: KVCalibration | None) -> None:
        self.plan, self.calibration = plan, calibration

    def make(self, config: Any) -> QuantizedCache:
        return QuantizedCache(config, self.plan)

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if model.training:
            return None
        names = list(inspect.signature(model.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
        if not use_cache or given.get(PAST) is not None:
            return None
        if PAST in names[: len(args)]:
            at = names.index(PAST)
            return (*args[:at], self.make(model.config), *args[at + 1 :]), kwargs
        return args, kwargs | {PAST: self.make(model.config)}


def use_plan(model: Any, plan: KVPlan, calibration: KVCalibration | None = None) -> Any:
    """Let the model keep its cache as `plan` says, in place of another plan; returns the model.

    KVError where it cannot. calibration: goes with the plan into what `bitpalette.save_pretrained` writes.
    """
    plan.check(packed_layers(model.config))
    QuantizedCache(model.config, plan)  # says what is wrong
    maker = CacheMaker(plan, calibration)
    drop_plan(model)
    model.set_attn_implementation(NAME)
    model.register_forward_pre_hook(maker, with_kwargs=True)
    setattr(model, PREPARE, MethodType(_prepare_cache_for_generation, model))
    return model


def drop_plan(model: Any) -> Any:
    """The model's cache is transformers' again; returns the model."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, CacheMaker):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    model.__dict__.pop(PREPARE, None)
    return model


def plan_of(model: Any) -> StoredKVPlan | None:
    """The plan that `use_plan` gave the model, or None."""
    maker = _maker(model)
    return None if maker is None else StoredKVPlan(maker.plan, maker.calibration)


def apply_spec(model: Any, spec: str | None, directory: str | Path | None) -> Any:
    """Let the model's cache be what `spec` says (`kv_load.plan_from_spec`) for the checkpoint in `directory`."""
    stored = stored_from_spec(spec, directory, model.config)
    return drop_plan(model) if stored is None else use_plan(model, stored.plan, stored.calibration)


def use_stored_plan(model: Any, folder: str | Path) -> None:
    """What `from_pretrained` does: the plan beside the weights, where there is one. A model that was given another
    attention than transformers' default keeps its dense cache, and one line on stderr says so."""
    stored = read_kv_plan(folder)
    if stored is None:
        return
    attention = model.config._attn_implementation
    if attention not in (NAME, "sdpa") and not (attention == "eager" and not model._supports_sdpa):
        print(
            f"bitpalette: the plan of the KV cache is not used, attention {attention!r} was asked for; "
            f"load without attn_implementation, or with {NAME!r}, to use it",
            file=sys.stderr,
        )
        return
    use_plan(model, stored.plan, stored.calibration)


def _maker(model: Any) -> CacheMaker | None:
    return next(
        (hook for hook in getattr(model, "_forward_pre_hooks", {}).values() if isinstance(hook, CacheMaker)), None
    )


def _prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """transformers' method, with a packed cache where it would make a dynamic, static or offloaded one. Caches of other
    names, "dynamic" among them where the call says so, are transformers' own."""
    maker = _maker(self)
    kind = generation_config.cache_implementation
    if kind == getattr(self.generation_config, "cache_implementation", None):
        kind = None  # not of this call
    if maker is None or kind not in OPTIONS or model_kwargs.get(PAST) is not None or not generation_config.use_cache:
        given = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        return getattr(type(self), PREPARE)(self, *given)
    tokens = max_cache_length if kind == "static" else 0
    cache = model_kwargs[PAST] = QuantizedCache(self.config, maker.plan, tokens, **OPTIONS[kind])
    if generation_config.is_assistant:
        cache.activate_past_recording()
    return None
