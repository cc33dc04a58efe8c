"""What came of a plan: the written checkpoint against the original, kept beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .calibrate.card import CARD_NAME, write_card
from .calibrate.compile import Compilation
from .calibrate.measure_plan import Rounded, measure_plans
from .calibrate.plan import PlanError
from .calibrate.text import Calibration, held_out_sequences
from .calibrate.whole import load_tokenizer
from .formats.atomic import write_atomically
from .formats.kv_plan_file import StoredKVPlan, read_kv_plan
from .formats.manifest import MANIFEST_NAME, hash_file, read_manifest, rewrite_manifest
from .formats.native import open_native
from .formats.plan_file import PLAN_NAME, Measured, StoredPlan, encoded
from .kv_planning import plan_of_pairs
from .quant.kv_format import KVFormat

TOKENS = 4096


def measure_result(
    compilation: Compilation,
    calibration: Calibration,
    progress: Callable[[int, int], None] = lambda done, of: None,
    tokens: int = TOKENS,
) -> Measured:
    """What a compilation has written against its original, on text that statistics were not taken on as far as the
    calibration text has such: of the weights alone, inputs of layers in float32; a block of both is in memory at a
    time."""
    skeleton, written = compilation.skeleton, open_native(compilation.out)
    count = max(2, tokens // calibration.seq_len)
    held_out = held_out_sequences(calibration, load_tokenizer(compilation.source), count)

    def stored(index: int | None) -> Rounded:
        def value(name: str, w: Tensor, form: object) -> Tensor:
            if name not in written.quantized_names:
                return written.read(name)
            q = written.read_quantized(name).dequantize()
            return q.T.contiguous() if compilation.weights[name].kind == "conv1d" else q

        return value

    every = dict.fromkeys(skeleton.parameters, "as written")
    (found,) = measure_plans(skeleton, compilation.weights, held_out, [every], stored, torch.float32, progress)
    return Measured(
        kl=found.kl,
        kl_se=found.standard_error,
        perplexity=found.perplexity,
        reference_perplexity=found.reference_perplexity,
        top1=found.top1,
        text_name=Path(calibration.text).name,
        tokens=held_out.numel(),
    )


def store_result(out: Path, stored: StoredPlan, measured: Measured) -> StoredPlan:
    """Into the checkpoint's plan file and its card; the manifest lists the new ones. Interrupted, the checkpoint is
    complete or its manifest lacks those two alone."""
    told = stored.model_copy(update={"measured": measured})
    manifest = read_manifest(out)
    names = (PLAN_NAME, CARD_NAME)
    if [manifest.files.pop(name, None) for name in names] != [None, None]:
        rewrite_manifest(out, manifest)
    write_atomically(out / PLAN_NAME, encoded(told))
    write_card(out)
    manifest.files |= {name: hash_file(out / name) for name in names}
    rewrite_manifest(out, manifest)
    return told


def take_back(out: Path) -> None:
    """Without its manifest a folder is no checkpoint."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)


def planned_cache(stored: StoredPlan, folder: Path | None) -> StoredKVPlan | None:
    """The plan of the KV cache that goes with `stored`, None where the cache was not planned; folder: of statistics,
    where the means of keys are. PlanError without them."""
    if stored.cache is None:
        return None
    known = None if folder is None else read_kv_plan(folder)
    if known is None:
        raise PlanError(
            "the plan is for weights and cache, and the means of its keys lie in the folder of statistics: --stats "
            "names the one that `quantize plan` had"
        )
    pairs = {layer: KVFormat.parse(c.format) for layer, c in stored.cache.items()}
    plan = plan_of_pairs({n: (f.bits_k, f.bits_v) for n, f in pairs.items()}, known.plan.default, known.plan.means)
    return StoredKVPlan(plan, known.calibration)
