"""The Python interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .calibrate.collect import collecting, expert_stats
from .calibrate.compile import Compilation
from .calibrate.fisher import fisher_diagonal
from .calibrate.plan import Plan, PlanError
from .calibrate.report import Events, Record
from .calibrate.structure import quantizable
from .calibrate.text import Calibration
from .formats.base import Source, open_source
from .formats.kv_plan_file import write_kv_plan
from .formats.manifest import write_manifest
from .kernels.linear import QuantLinear
from .kv_use import apply_spec, plan_of
from .quant.scheme import Scheme
from .quant.solver import plan_solver, quantize_tensor
from .quant.stats import Stats
from .quant.tensor import QuantizedTensor, stack


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    kv: str | None = None,
) -> Any:
    """The model of a packed checkpoint, its layers replaced by ones that compute from the packed bits.

    dtype: of activations and unquantized weights ("auto": the checkpoint's). kv: of the cache of keys and values; None:
    the checkpoint's plan, where it has one, else what `kv_load.plan_from_spec` takes ("16": transformers' own cache;
    "k4v4", "auto:3.25"). FormatError for a folder that is incomplete, damaged or of a newer format; KVError for a
    cache that the model cannot have.
    """
    import transformers

    from .formats.native import open_native

    source = open_native(path)
    names = source.config.get("architectures") or ["AutoModelForCausalLM"]
    cls = getattr(transformers, names[0])
    model = cls.from_pretrained(str(path), device_map={"": str(device)}, dtype=dtype).eval()
    return model if kv is None else apply_spec(model, kv, source.path)


def save_pretrained(model: Any, path: str | Path, **options: Any) -> None:
    """transformers' `save_pretrained` (its `options`), the plan of the model's KV cache where it has one, and the
    manifest that makes the folder a complete checkpoint."""
    model.save_pretrained(str(path), **options)
    if (stored := plan_of(model)) is not None:
        write_kv_plan(path, stored, __version__)
    write_manifest(path)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    *,
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Token ids [batch, prompt + new] after `input_ids` [batch, prompt], greedy unless `options` (those of
    transformers' `generate`) say otherwise.

    A Llama-like model on the CPU runs by one native call a token, from one prompt a call; whatever else there is runs
    by transformers' own loop, and a line on stderr says why. generator: what samples are drawn from (None: torch's
    global one). on_token: called with every new token. ValueError where the two are given to a model or a batch that
    only transformers' loop can run.
    """
    from .generation import native_generate, say_fallback, why_not

    options.setdefault("do_sample", False)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    input_ids = input_ids.to(model.device)
    reason = why_not(model, input_ids, options)
    if reason is None:
        return native_generate(model, input_ids, max_new_tokens, options, generator, on_token)
    if generator is not None or on_token is not None:
        given = "generator" if generator is not None else "on_token"
        raise ValueError(f"{given} needs the native decoder, and {reason}; use torch.manual_seed and streamer instead")
    say_fallback(type(model).__name__, reason)
    return model.generate(input_ids, max_new_tokens=max_new_tokens, **options)


def quantize_linear(
    linear: nn.Module, scheme: Scheme | dict, *, solver: str = "rtn", stats: Stats | None = None, seed: int = 0
) -> QuantLinear:
    """A QuantLinear in place of an nn.Linear (or transformers' Conv1D). Arguments and errors as `quantize_tensor`."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    w = weight if isinstance(linear, nn.Linear) else weight.T
    qt = quantize_tensor(w, scheme, solver=solver, stats=stats, seed=seed)
    return QuantLinear.from_tensor(qt, None if bias is None else bias.detach().clone())


def quantize_model(model: Any, plan: Plan | dict, *, tokens: Tensor | None = None) -> Any:
    """Replace, in place, the layers of a transformers model in memory as `plan` says; returns the model.

    tokens: int64 [sequences, length], for solvers that need statistics; they are taken from the unquantized model in
    one pass, where it is: on a GPU, layers are quantized there. For checkpoints larger than memory there is
    `compile_checkpoint`, which also folds and tunes: PlanError where the plan asks for that, or cannot be followed.
    """
    from .calibrate.structure import decoder_blocks
    from .hf import replace_modules

    if isinstance(plan, dict):
        plan = Plan.from_dict(plan)
    if plan.fold or plan.tune:
        raise PlanError(f"{'fold' if plan.fold else 'tune'} is of compile_checkpoint, not of a model in memory")
    weights = quantizable(model)
    blocks = tuple(name + "." for name, _ in decoder_blocks(model))
    chosen = {k: s for k, s in plan.resolve(weights, [k for k in weights if k.startswith(blocks)]).items() if s}
    solvers = {k: plan.solver_for(weights[k], s, k.startswith(blocks)) for k, s in chosen.items()}
    calibrated = {k: weights[k] for k, solver in solvers.items() if solver != "rtn"}
    by_fisher = {k: weights[k] for k, s in chosen.items() if plan_solver(s, solvers[k])[1].needs_fisher}
    moments: dict[str, Any] = {}
    fisher: dict[str, Tensor] = {}
    if calibrated:
        if tokens is None:
            raise PlanError(f"solver {plan.solver} needs calibration tokens (tokens=)")
        tokens = tokens.to(model.device)
        if by_fisher:
            fisher = fisher_diagonal(model, by_fisher, tokens, plan.seed)
        with collecting(model, calibrated) as moments, torch.no_grad():
            for batch in tokens.split(4):
                model(input_ids=batch)
    packed: dict[str, QuantizedTensor] = {}
    for name, scheme in chosen.items():
        w, moment = model.get_parameter(name), moments.get(name)
        solver = solvers[name] if moment is not None else "rtn"  # None: a layer that is never called
        if w.ndim == 3:
            stats = expert_stats(moment) if moment is not None else [None] * len(w)
            pairs = zip(w, stats, strict=True)
            packed[name] = stack([quantize_tensor(m, scheme, solver=solver, stats=s, seed=plan.seed) for m, s in pairs])
        else:
            matrix = w.T if weights[name].kind == "conv1d" else w
            stat = moment.stats() if moment is not None else None
            if name in fisher and stat is not None:
                stat = replace(stat, fisher=fisher[name])
            packed[name] = quantize_tensor(matrix, scheme, solver=solver, stats=stat, seed=plan.seed)
    return replace_modules(model, packed)


def compile_checkpoint(
    model: str | Source,
    out: str | Path,
    plan: Plan | dict,
    *,
    calibration: Calibration | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    work: str | Path | None = None,
    stats: str | Path | None = None,
    tune_seconds: float | None = None,
    device: str | torch.device = "cpu",
    events: Events | None = None,
) -> list[Record]:
    """Quantize a checkpoint into the folder `out`, a block at a time; what `quantize run` does.

    model: a transformers folder, a .gguf file, a hub id, or an opened source. device: "cpu", "cuda" or "cuda:N", where
    blocks are brought one at a time, calibrated and quantized. Interrupted, the same call goes on where it stopped.
    Returns a record for each quantized weight. Raises FormatError, PlanError, CalibrationError.
    """
    compilation = prepare_compilation(
        model,
        out,
        plan,
        calibration=calibration,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        work=work,
        stats=stats,
        tune_seconds=tune_seconds,
        device=device,
        events=events,
    )
    return compilation.run()


def prepare_compilation(
    model: str | Source,
    out: str | Path,
    plan: Plan | dict,
    *,
    calibration: Calibration | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    work: str | Path | None = None,
    stats: str | Path | None = None,
    tune_seconds: float | None = None,
    device: str | torch.device = "cpu",
    beside: Mapping[str, bytes] = MappingProxyType({}),
    events: Events | None = None,
) -> Compilation:
    """As `compile_checkpoint`, all checks done and nothing written yet: `.sizes()` tells what `.run()` will write."""
    source = open_source(model) if isinstance(model, str) else model
    return Compilation(
        source,
        Plan.from_dict(plan) if isinstance(plan, dict) else plan,
        Path(out),
        calibration=calibration,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        work=None if work is None else Path(work),
        stats=None if stats is None else Path(stats),
        tune_seconds=tune_seconds,
        device=device,
        version=__version__,
        beside=beside,
        events=events,
    )
