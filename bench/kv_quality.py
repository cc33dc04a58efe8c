"""KL per token of a model that reads a packed cache: teacher-forced, in chunks through the cache, so that every token
further back than the window is read from packed bits.

    python bench/kv_quality.py MODEL --calibrate valid.txt --text test.txt [--out table.json] k4v4 k3v3 k4v2 k2v2
    python bench/kv_quality.py MODEL --out table.json --show

A case is a format (k4v4, k2v2-channel, k4v4-bfp32), with "sorted-" before it for sorted key channels of block floating
point and ":SINKS,WINDOW" behind it for other numbers of exact tokens (4,64); or transformers' own cache, quanto4,
quanto2, hqq4, hqq2, with its defaults. Keys of the kind "token" are centered with their mean over `--calibrate` (its
first tokens, dense cache). KL(dense || packed) in nats per token, the dense model in float32, over all positions and
over those that read packed tokens. --out: a file that is there keeps its other rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import QuantizedCache as TransformersCache

from bitpalette.calibrate.evaluate import chunks_of
from bitpalette.kv_attention import NAME
from bitpalette.kv_cache import QuantizedCache
from bitpalette.kv_load import packed_layers
from bitpalette.kv_order import with_orders
from bitpalette.provenance import commit, processor
from bitpalette.quant.kv_format import BLOCKS, KVFormat
from bitpalette.quant.kv_plan import KVPlan

PEERS = ("quanto", "hqq")
PEER_GROUP, PEER_WINDOW = 64, 128
"""Defaults of transformers' cache: channels of a group, and most tokens that it keeps in 16 bits."""


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
    out = torch.empty(len(tokens), model.config.vocab_size)
    for first in range(0, len(tokens), step):
        part = tokens[None, first : first + step]
        logits = model(input_ids=part, past_key_values=cache).logits[0].float()
        out[first : first + step] = logits.log_softmax(-1)
    return out


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """float64 [n]; a few positions at a time."""
    parts = zip(log_p.split(64), log_q.split(64), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(-1, dtype=torch.float64) for p, q in parts])


class Case:
    """A row of the table: what its name says, and a new cache of it."""

    def __init__(self, name: str, model: Any, means: dict[int, Tensor]) -> None:
        self.name, self.model, self.attention = name, model, NAME
        self.peer = next((peer for peer in PEERS if name.startswith(peer)), None)
        if self.peer is not None:
            self.bits, self.attention = int(name.removeprefix(self.peer)), "sdpa"
            self.exact, self.bits_per_element = 0, self.bits + 32 / PEER_GROUP
            return
        of, _, exact = name.partition(":")
        sinks, window = (int(n) for n in (exact or "4,64").split(","))
        form = KVFormat.parse(of.removeprefix("sorted-"), sinks=sinks, window=window)
        self.plan = KVPlan(form, means=means if form.kind == "token" else {})
        if of.startswith("sorted-"):
            if form.kind not in BLOCKS:
                raise SystemExit(f"{name}: only block floating point sorts channels")
            self.plan = with_orders(self.plan, model, packed_layers(model.config))
        self.exact, self.bits_per_element = sinks + window, form.bits_per_element(model.config.head_dim)

    def cache(self, tokens: int) -> Any:
        if self.peer is not None:
            return TransformersCache(self.peer, self.model.config, nbits=self.bits)
        return QuantizedCache(self.model.config, self.plan, tokens=tokens)


def measure(case: Case, tokens: Tensor, reference: list[Tensor], step: int) -> dict[str, Any]:
    start, found, loss = time.monotonic(), [], 0.0
    case.model.set_attn_implementation(case.attention)
    for row, log_p in zip(tokens, reference, strict=True):
        log_q = log_probabilities(case.model, case.cache(len(row)), row, step)
        found.append(divergence(log_p, log_q))
        loss -= float(log_q[:-1].gather(1, row[1:, None]).sum(dtype=torch.float64))
    kl = torch.stack(found)
    return {
        "bits_per_element": case.bits_per_element,
        "kl": round(float(kl.mean()), 5),
        "kl_by_chunk": [round(float(k), 5) for k in kl.mean(1)],
        "kl_packed": None if case.peer else round(float(kl[:, case.exact + step :].mean()), 5),
        "perplexity": round(float(torch.tensor(loss / (tokens.numel() - len(tokens))).exp()), 4),
        "tokens": list(tokens.shape),
        "step": step,
        "seconds": round(time.monotonic() - start, 1),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table in Markdown."""
    print("| cache | bits an element | KL, nats a token | where packed tokens are read | perplexity |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        if "why_not" in row:
            print(f"| {name} | - | {row['why_not']} | | |")
            continue
        packed = "" if row["kl_packed"] is None else f"{row['kl_packed']:.4f}"
        print(f"| {name} | {row['bits_per_element']:g} | {row['kl']:.4f} | {packed} | {row['perplexity']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("cases", nargs="*", help="k4v4, k2v2-channel:0,128, sorted-k4v4-bfp32, quanto4, ...")
    parser.add_argument("--calibrate", type=Path, help="text for the means of keys; without it they are not centered")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--step", type=int, default=16, help="tokens a forward")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", action="store_true", help="print the table that --out holds")
    args = parser.parse_intermixed_args()
    kept: dict[str, Any] = {"about": {}, "rows": {}}
    if args.out and args.out.exists():
        kept = json.loads(args.out.read_text())
    if args.show:
        show(kept["rows"])
        return
    if args.text is None:
        raise SystemExit("--text is missing: a file to evaluate on")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    means = {}
    if args.calibrate:
        means = key_means(model, chunks_of(tokenizer, args.calibrate.read_text(), args.seq_len, 1))
    tokens = chunks_of(tokenizer, args.text.read_text(), args.seq_len, args.chunks)
    reference = [log_probabilities(model, DynamicCache(config=model.config), row, len(row)) for row in tokens]
    kept["about"] = {"model": args.model.name, "processor": processor(), "threads": torch.get_num_threads()}
    for name in args.cases:
        case = Case(name, model, means)
        row: dict[str, Any]
        try:
            row = measure(case, tokens, reference, args.step)
        except ImportError as error:  # of a package that transformers' cache needs
            row = {"why_not": " ".join(str(error).split())}
        row["centered"] = bool(case.peer is None and case.plan.means)
        row["commit"] = commit()
        row["command"] = "python bench/kv_quality.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:])
        kept["rows"][name] = row
        print(json.dumps({name: row}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
