"""KL per token of a model that reads a packed cache: teacher-forced, in chunks through the cache, so that every token
further back than the window is read from packed bits.

    python bench/kv_quality.py MODEL --calibrate valid.txt --text test.txt --seq-len 512 --chunks 1 k4v4 k3v3 k4v2 k2v2

Keys are centered with their mean over `--calibrate` (its first tokens, dense cache). KL(dense || packed) in nats per
token, the dense model in float32, over all positions and over those that read packed tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bitpalette.calibrate.evaluate import chunks_of
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.kv_plan import KVPlan


@torch.inference_mode()
def key_means(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """{layer: float32 [kv_heads, head_dim]} of the keys of tokens int64 [rows, n]."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache)
    layers: list[Any] = cache.layers
    return {i: layer.keys.float().mean((0, 2)) for i, layer in enumerate(layers)}


@torch.inference_mode()
def log_probabilities(model: Any, cache: Any, tokens: Tensor, step: int) -> Tensor:
    """float32 [n, vocabulary] for tokens int64 [n], `step` a forward."""
    out = []
    for part in tokens[None].split(step, 1):
        out.append(model(input_ids=part, past_key_values=cache).logits[0].float().log_softmax(-1))
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("formats", nargs="+", help="k4v4, k3v2, ... or 16")
    parser.add_argument("--calibrate", type=Path, help="text for the means of keys; without it they are not centered")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--step", type=int, default=64, help="tokens a forward")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.set_attn_implementation(NAME)
    means = {}
    if args.calibrate:
        means = key_means(model, chunks_of(tokenizer, args.calibrate.read_text(), args.seq_len, 1))
    tokens = chunks_of(tokenizer, args.text.read_text(), args.seq_len, args.chunks)
    reference = [log_probabilities(model, DynamicCache(config=model.config), row, len(row)) for row in tokens]
    for name in args.formats:
        form, start = KVFormat.parse(name, sinks=args.sinks, window=args.window), time.monotonic()
        divergence = []
        for row, log_p in zip(tokens, reference, strict=True):
            cache = QuantizedCache(model.config, KVPlan(form, means=means), tokens=len(row))
            log_q = log_probabilities(model, cache, row, args.step)
            divergence.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64))
        kl = torch.stack(divergence)
        width = cache.packed[0].rows.head_dim
        print(
            json.dumps(
                {
                    "format": str(form),
                    "bits_per_element": form.bits_per_element(width),
                    "centered": bool(means),
                    "kl": round(float(kl.mean()), 5),
                    "kl_packed": round(float(kl[:, args.step + args.sinks + args.window :].mean()), 5),
                    "tokens": tokens.numel(),
                    "step": args.step,
                    "seconds": round(time.monotonic() - start, 1),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
