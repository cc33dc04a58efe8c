"""Evaluating a checkpoint on disk: what `quantize eval` computes."""

from __future__ import annotations

import ast
import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .calibrate.evaluate import Evaluation, chunks_of, evaluate
from .calibrate.skeleton import DTYPES
from .calibrate.text import CalibrationError, check_length, read_text
from .calibrate.whole import load_model, load_tokenizer
from .formats.base import Source, open_source
from .formats.errors import FormatError
from .formats.native import NativeSource
from .kv_evaluation import STEP, CacheEvaluation, evaluate_cache
from .kv_load import OFF, plan_from_spec
from .kv_needle import Cell, needle_table
from .quant.kv_format import KVError
from .quant.kv_plan import KVPlan

QUESTION = 32
"""Tokens of a needle's question and number, at most."""


def compare(
    checkpoint: str,
    against: str | None,
    text: str | None,
    seq_len: int,
    chunks: int,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, of: None,
    kv: str | None = None,
    kv_step: int = STEP,
) -> dict[str, Any]:
    """The values of `quantize eval --json`. The reference is computed in float32. text None: `library_prose`.

    kv: evaluate through the packed cache that `plan_from_spec` makes of it, `kv_step` tokens a forward; None: without.
    """
    source = open_source(checkpoint)
    check_length(seq_len, source.config.get("max_position_embeddings", source.config.get("n_positions")), source.path)
    prose = library_prose() if text is None else read_text(text)
    reference_source = None if against is None else open_source(against)
    if reference_source is not None:
        sizes = [s.config.get("vocab_size") for s in (source, reference_source)]
        if sizes[0] != sizes[1]:
            raise FormatError(
                f"{checkpoint} has a vocabulary of {sizes[0]} tokens, {against} one of {sizes[1]}; only models of one "
                "vocabulary can be compared"
            )
    tokens = chunks_of(load_tokenizer(source), prose, seq_len, chunks)
    model = load_any(source, DTYPES[dtype])
    reference = None if reference_source is None else load_any(reference_source, torch.float32)
    plan = None if kv is None else plan_from_spec(kv, source.path, model.config)
    of_cache: dict[str, Any] = {}
    if plan is None:
        result = evaluate(model, tokens, reference, progress)
    else:
        result, of_cache = through_cache(evaluate_cache(model, tokens, plan, kv_step, reference, progress))
    return {
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "kl_divergence": result.kl_divergence,
        "kl_standard_error": result.kl_standard_error,
        "top1_agreement": result.top1_agreement,
        "tokens": result.tokens,
        **rates(source),
        **of_cache,
        "model_bytes": source.size_bytes,
        "seconds": round(result.seconds, 2),
    }


def through_cache(found: CacheEvaluation) -> tuple[Evaluation, dict[str, Any]]:
    """(what an evaluation without a cache gives, what comes on top): the second compares with the dense cache."""
    against = found.from_reference
    result = Evaluation(
        perplexity=found.perplexity,
        tokens=found.tokens,
        seconds=found.seconds,
        reference_perplexity=found.reference_perplexity,
        kl_divergence=None if against is None else against.kl,
        kl_standard_error=None if against is None else against.standard_error,
        top1_agreement=None if against is None else against.top1_agreement,
    )
    return result, {
        "kv_dense_perplexity": found.dense_perplexity,
        "kv_kl_divergence": found.from_dense.kl,
        "kv_kl_standard_error": found.from_dense.standard_error,
        "kv_kl_of_packed_reads": found.kl_packed if math.isfinite(found.kl_packed) else None,
        "kv_top1_agreement": found.from_dense.top1_agreement,
        "kv_bits_per_element": found.bits_per_element,
        "kv_bytes": found.bytes,
        "kv_formula_bytes": found.formula_bytes,
        "kv_dense_bytes": found.dense_bytes,
        "kv_step": found.step,
    }


def needles(
    checkpoint: str,
    kv: str | None,
    text: str | None,
    lengths: list[int],
    depths: list[float],
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[KVPlan, list[Cell]]:
    """What `quantize eval --needle` shows, and the plan that it used: of `kv`, None for the checkpoint's own."""
    source = open_source(checkpoint)
    positions = source.config.get("max_position_embeddings", source.config.get("n_positions"))
    if isinstance(positions, int) and max(lengths) + QUESTION > positions:
        raise CalibrationError(
            f"a prompt of {max(lengths)} tokens and its question are longer than the {positions} positions of "
            f"{source.path}; give --lengths up to {positions - QUESTION}"
        )
    model = load_any(source, DTYPES[dtype])
    plan = plan_from_spec(kv, source.path, model.config)
    if plan is None:
        raise KVError(
            f"--needle compares a packed cache with the dense one, and --kv {kv} packs nothing; say --kv k4v4"
            if kv == OFF
            else f"--needle compares a packed cache with the dense one, and {checkpoint} has no plan; say --kv k4v4"
        )
    prose = library_prose() if text is None else read_text(text)
    return plan, needle_table(model, load_tokenizer(source), prose, plan, lengths, depths, progress)


def load_any(source: Source, dtype: torch.dtype) -> Any:
    """A model of a packed checkpoint with the kernels a user runs, of any other source as it is."""
    if isinstance(source, NativeSource):
        from transformers.utils import logging

        from .api import load

        logging.disable_progress_bar()  # the command has a progress bar of its own
        return load(source.path, dtype=dtype)
    return load_model(source, dtype)


def rates(source: Source) -> dict[str, float]:
    """bits_per_weight over quantized weights (16 where there are none), file_bits_per_weight over the whole file."""
    weights = sum(math.prod(info.shape) for info in source.tensors.values())
    if not isinstance(source, NativeSource):
        bits = 8 * source.size_bytes / max(weights, 1)
        return {"bits_per_weight": bits, "file_bits_per_weight": bits}
    from .quant.scheme import Scheme
    from .quant.tensor import stored_bytes

    quantized, stored = 0, 0
    for entry in source.quantization.tensors.values():
        scheme = Scheme.from_dict(source.quantization.schemes[entry.scheme])
        shape = tuple(entry.shape)
        quantized += math.prod(shape)
        stored += stored_bytes(scheme, shape)
    return {
        "bits_per_weight": 8 * stored / quantized if quantized else 16.0,
        "file_bits_per_weight": 8 * source.size_bytes / weights,
    }


@cache
def library_prose() -> str:
    """English prose that comes with Python, other than what `builtin` calibrates on: docstrings of its library."""
    parts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    parts.append(text)
    return "\n\n".join(parts)
