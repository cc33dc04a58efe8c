"""What a prefix of the full-precision model (bitpalette/kv_prefix.py) saves a model with few bits a weight.

    python bench/kv_prefix.py ORIGINAL PACKED [PACKED ...] --text test.txt [--kv k4v4] [--out table.json]

KL(original || packed) in nats per token over the tokens behind the prefix, which is the BOS token alone or with a
system prompt; the packed model computes it itself, or finds the original's keys and values in its cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bitpalette.calibrate.evaluate import chunks_of
from bitpalette.calibrate.text import tokenize
from bitpalette.calibrate.whole import load_tokenizer
from bitpalette.evaluation import load_any, rates
from bitpalette.formats.base import open_source
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_prefix import Prefix, compute_prefix, with_prefix
from bitpalette.provenance import commit

SYSTEM = "You are a careful assistant. Answer in full sentences, say what you do not know, and keep to the question."


@torch.inference_mode()
def log_probabilities(model: Any, cache: Any, tokens: Tensor, step: int) -> Tensor:
    """float32 [n, vocabulary]."""
    parts = tokens[None].split(step, 1)
    return torch.cat([model(input_ids=p, past_key_values=cache).logits[0].float().log_softmax(-1) for p in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original")
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kv", default="16", help="cache of the packed model; 16: dense")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = open_source(args.original)
    tokenizer, original = load_tokenizer(source), load_any(source, torch.float32)
    original.set_attn_implementation(NAME)
    chunks = chunks_of(tokenizer, args.text.read_text(), args.seq_len, args.chunks)
    bos = torch.tensor([tokenizer.bos_token_id])
    prefixes = {"BOS": bos, "BOS and system prompt": torch.cat((bos, tokenize(tokenizer, SYSTEM)))}
    rows = []
    for path in args.packed:
        packed_source = open_source(path)
        model = load_any(packed_source, torch.float32)
        model.set_attn_implementation(NAME)

        def empty(model: Any = model) -> Any:
            config = model.config
            return DynamicCache(config=config) if args.kv == "16" else QuantizedCache(config, args.kv)

        for name, tokens in prefixes.items():
            exact: Prefix = compute_prefix(original, tokens)
            kl: dict[str, list[float]] = {"kl_own": [], "kl_exact": []}
            for chunk in chunks:
                whole, n = torch.cat((tokens, chunk)), len(tokens)
                log_p = log_probabilities(original, DynamicCache(config=original.config), whole, len(whole))[n:]
                own, given = empty(), with_prefix(empty(), exact)
                log_probabilities(model, own, tokens, n)
                for key, cache in (("kl_own", own), ("kl_exact", given)):
                    log_q = log_probabilities(model, cache, chunk, 64)
                    kl[key].append(float((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).mean()))
            row = {
                "model": Path(path).name,
                "bits_per_weight": round(rates(packed_source)["bits_per_weight"], 3),
                "kv": args.kv,
                "prefix": name,
                "prefix_tokens": len(tokens),
                **{key: round(sum(values) / len(values), 5) for key, values in kl.items()},
                "tokens": list(chunks.shape),
                "commit": commit(),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
