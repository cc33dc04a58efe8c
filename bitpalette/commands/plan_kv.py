"""`quantize plan-kv`: which bits the KV cache of every layer gets, measured on text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .phases import phases
from .text import duration, size, sized

BITS = 3.25


def register(app: typer.Typer) -> None:
    app.command("plan-kv")(plan_kv)


def plan_kv(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any model.")],
    bits: Annotated[
        float | None, typer.Option(help="Bits an element on average, gains counted.", show_default=f"{BITS:g}")
    ] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="In place of --bits: what the cache may take, such as 200MB.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row that the cache is for.", show_default="the longest of --lengths")
    ] = None,
    batch: Annotated[int, typer.Option(help="With --bytes: rows that the cache is for.")] = 1,
    text: Annotated[str, typer.Option(help="Calibration text: a file, or builtin.")] = "builtin",
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on, shared out evenly over --lengths.")] = 8192,
    lengths: Annotated[str, typer.Option(help="Tokens of calibration sequences.")] = "512,2048",
    kl_tokens: Annotated[int, typer.Option(help="Tokens that KL divergences of single layers are measured on.")] = 2048,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that stay exact.", show_default="0 to 16, as many as pay")
    ] = None,
    window: Annotated[int, typer.Option(help="Last tokens that stay exact.")] = 64,
    mixes: Annotated[int, typer.Option(help="Random plans that check whether costs of layers add up.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder or file for the plan.", show_default="MODEL, where it is packed")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "float32",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what fewer bits cost in every layer of MODEL's KV cache, and store the cheapest plan within a budget.

    Where the plan at OUT was measured on the same model and text, only the budget is solved again.
    """
    from ..calibrate.plan import PlanError
    from ..calibrate.skeleton import DTYPES
    from ..formats.base import open_source
    from ..formats.kv_plan_file import prepare_place, write_kv_plan
    from ..formats.native import NativeSource
    from ..kv_planning import KVBudget, solve

    started = time.monotonic()
    if dtype not in DTYPES:
        raise PlanError(f"--dtype is one of {list(DTYPES)}; got {dtype!r}")
    if kl_tokens < 1 or mixes < 0:
        raise PlanError(f"--kl-tokens is 1 or more, --mixes 0 or more; got {kl_tokens} and {mixes}")
    if bytes_ is None and bits is None:
        bits = BITS
    budget = KVBudget(bits, None if bytes_ is None else sized("--bytes", bytes_), context, batch)
    source = open_source(model)
    if out is None and not isinstance(source, NativeSource):
        raise PlanError(f"{model} is not packed and is left alone; say where the plan goes with --out FOLDER_OR_FILE")
    place = source.path if out is None else out
    prepare_place(place)
    stored = measured_cache(
        source, place, text, tokens, _lengths(lengths), kl_tokens, sinks, window, mixes, DTYPES[dtype]
    )
    solved, allocation = solve(stored, budget)
    from .._version import __version__

    path = write_kv_plan(place, solved, __version__)
    values = _summary(solved, allocation, budget, path, time.monotonic() - started)
    if json_output:
        print(json.dumps(values))
    else:
        _show(solved, allocation, values)


def _lengths(text: str) -> list[int]:
    from ..calibrate.plan import PlanError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise PlanError(f"--lengths {text!r} are no numbers of tokens such as 512,2048")
    return sorted({int(part) for part in parts})


def measured_cache(
    source: Any,
    place: Path,
    text: str,
    tokens: int,
    lengths: list[int],
    kl_tokens: int,
    sinks: int | None,
    window: int,
    mixes: int,
    dtype: Any,
) -> Any:
    """The stored plan where it tells of the same model and text, else a new one, measured with a progress bar."""
    from rich.console import Console

    from ..calibrate.text import Calibration, CalibrationError, check_length, sequences
    from ..evaluation import load_any, load_tokenizer
    from ..formats.kv_plan_file import StoredKVPlan, kv_plan_path, read_kv_plan
    from ..kernels.activation_form import EXACT, layers_made_with
    from ..kv_planning import KVPlanner, KVText
    from ..kv_use import drop_plan
    from ..quant.kv_plan import KVPlan

    if text == "self":
        raise CalibrationError("--text self: plans are measured on written text; give a file, or builtin")
    positions = source.config.get("max_position_embeddings", source.config.get("n_positions"))
    calibrations = {}
    for length in lengths:
        check_length(length, positions, source.path)
        calibrations[length] = Calibration(text, max(tokens // len(lengths), length), length)
    fingerprint = "+".join(c.fingerprint()[:16] for c in calibrations.values())
    model_fingerprint = source.fingerprint()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    known = read_kv_plan(place) if kv_plan_path(place).exists() else None
    if known is not None and known.calibration is not None:
        same = known.calibration.model == model_fingerprint and known.calibration.text == fingerprint
        if same and known.plan.default.window == window and sinks in (None, known.plan.default.sinks):
            console.print(f"{kv_plan_path(place)}: measured before on this model and text; solved again")
            return known
    tokenizer = load_tokenizer(source)
    prepared = {length: sequences(c, tokenizer) for length, c in calibrations.items()}
    name = text if text == "builtin" else Path(text).name
    with layers_made_with(EXACT):
        model = drop_plan(load_any(source, dtype))
        with phases() as step:
            planner = KVPlanner(
                model,
                KVText(prepared, name, fingerprint),
                window=window,
                sinks=sinks,
                kl_tokens=kl_tokens,
                mixes=mixes,
                progress=step,
            )
            calibration = planner.measure(model_fingerprint)
    return StoredKVPlan(KVPlan(planner.exact, {}, planner.means), calibration)


def _summary(stored: Any, allocation: Any, budget: Any, path: Path, seconds: float) -> dict[str, Any]:
    calibration, exact = stored.calibration, stored.plan.default
    ratios = [m.measured / m.predicted for m in calibration.mixes if m.predicted > 0]
    values: dict[str, Any] = {
        "out": str(path),
        "budget": str(budget),
        "bits_per_element": allocation.bits,
        "predicted_kl": allocation.predicted,
        "gap": allocation.gap,
        "classes": len(set(allocation.pairs.values())),
        "sinks": exact.sinks,
        "window": exact.window,
        "sink_mass": [round(m, 5) for m in calibration.sink_mass],
        "sinks_error": calibration.sinks_error,
        "spearman": calibration.spearman,
        "measured_over_predicted": [min(ratios), max(ratios)] if ratios else None,
        "layers": {n: {"bits_k": k, "bits_v": v, "kl": allocation.costs[n]} for n, (k, v) in allocation.pairs.items()},
        "seconds": round(seconds, 1),
    }
    if budget.context is not None:
        layers = calibration.layers
        values["bytes"] = sum(budget.layer_bytes(layers[n], stored.plan.format_of(n)) for n in layers)
        dense = type(exact)(16, 16, exact.sinks, exact.window)
        values["dense_bytes"] = sum(budget.layer_bytes(layer, dense) for layer in layers.values())
    return values


def _show(stored: Any, allocation: Any, values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None)
    for column in ("layer", "K bits", "V bits", "predicted KL"):
        table.add_column(column, justify="right")
    for layer, (keys, of_values) in allocation.pairs.items():
        table.add_row(str(layer), str(keys), str(of_values), f"{allocation.costs[layer]:.2e}")
    console.print(table)
    gap = f" (at most {allocation.gap:.1e} above the best)" if allocation.gap > 0 else ""
    console.print(
        f"{values['bits_per_element']:.3f} bits an element in {values['classes']} formats, "
        f"predicted KL {values['predicted_kl']:.4f} nats a token{gap}; "
        f"{values['sinks']} sinks, window {values['window']}"
    )
    first = sum(stored.calibration.sink_mass[:4])
    console.print(f"attention on the first token {values['sink_mass'][0]:.1%}, on the first four {first:.1%}")
    if values["sinks_error"]:
        told = ", ".join(f"{n}: {e:.2e}" for n, e in values["sinks_error"].items())
        console.print(f"error of attention at k3v3 by number of sinks: {told}")
    if values["measured_over_predicted"] is not None:
        low, high = values["measured_over_predicted"]
        rank = "" if values["spearman"] is None else f", Spearman {values['spearman']:.2f}"
        count = len(stored.calibration.mixes)
        console.print(f"{count} random mixes: measured KL {low:.2f} to {high:.2f} times the predicted{rank}")
    if "bytes" in values:
        console.print(f"{size(values['bytes'])} for this context, {size(values['dense_bytes'])} in 16 bits")
    console.print(f"written to {values['out']} in {duration(values['seconds'])}")
