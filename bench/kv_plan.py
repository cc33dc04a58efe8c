"""KL divergence of plans and formats of the KV cache on text they were not calibrated on, one JSON line each.

    python bench/kv_plan.py MODEL --plan PLACE --text test.txt plan k3v3 k4v2 auto:2.5

Every plan reads the packed cache in chunks of 64 tokens (bitpalette/kv_measure.py); means of keys, sinks and window are
those of the plan at PLACE, so that only the bits differ.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitpalette.calibrate.evaluate import chunks_of
from bitpalette.calibrate.kv_allocate import elements, stored_bits
from bitpalette.formats.kv_plan_file import read_kv_plan
from bitpalette.kv_load import packed_layers, plan_from_spec
from bitpalette.kv_measure import STEP, KLMeasure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("specs", nargs="+", help="plan, auto:3.25, k3v3, ...")
    parser.add_argument("--plan", type=Path, required=True, help="what `quantize plan-kv` wrote")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=2)
    args = parser.parse_args()

    stored = read_kv_plan(args.plan)
    if stored is None or stored.calibration is None:
        parser.error(f"{args.plan} has no plan with sensitivities")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers, exact = packed_layers(model.config), stored.plan.default
    tokens = chunks_of(tokenizer, args.text.read_text(), args.seq_len, args.chunks)
    first = -(-(exact.sinks + exact.window + 1) // STEP) * STEP
    measures = [KLMeasure(model, row[None], layers, first) for row in tokens]
    known = stored.calibration.layers
    for spec in args.specs:
        plan, start = plan_from_spec(spec, args.plan, model.config), time.monotonic()
        if plan is None:
            parser.error(f"{spec} is no packed cache")
        kl = [measure(plan) for measure in measures]
        pairs = {n: (plan.format_of(n).bits_k, plan.format_of(n).bits_v) for n in layers}
        bits = sum(stored_bits(known[n], pair) for n, pair in pairs.items())
        line = {
            "spec": spec,
            "bits_per_element": round(bits / sum(elements(known[n]) for n in layers), 4),
            "formats": len(set(pairs.values())),
            "kl_packed": round(sum(kl) / len(kl), 5),
            "by_chunk": [round(one, 5) for one in kl],
            "sinks": exact.sinks,
            "window": exact.window,
            "tokens": tokens.numel(),
            "seconds": round(time.monotonic() - start, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
