"""Peak resident memory of a compilation: a random Llama of 1.1 billion weights in bf16 shards of 500 MB.

    python bench/memory.py [--folder DIR] [--solver rtn|gptq]...

Writes the checkpoint shard by shard, then runs `quantize run` as a process of its own for every solver and prints the
kernel's own account of its largest resident set (what /usr/bin/time -v calls "Maximum resident set size").
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bitpalette.formats.shards import ShardWriter, plan_shards

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHARD = 500_000_000


def write_model(folder: Path) -> None:
    """The checkpoint with a byte-level tokenizer; tensors are made one at a time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    h, inner, kv = 2048, 5632, 256
    shapes = {"model.embed_tokens.weight": (32000, h)}
    for i in range(22):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (h,), at + "post_attention_layernorm.weight": (h,)}
        shapes |= {at + f"self_attn.{p}_proj.weight": (n, h) for p, n in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        shapes |= {
            at + f"mlp.{p}_proj.weight": s for p, s in (("gate", (inner, h)), ("up", (inner, h)), ("down", (h, inner)))
        }
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (32000, h)}
    plan = plan_shards([(name, shape, torch.bfloat16) for name, shape in shapes.items()], SHARD)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, plan) as writer:
        for name, shape in shapes.items():
            one = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.write(name, one.to(torch.bfloat16))
        writer.finish()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def peak_of(command: list[str]) -> tuple[int, float, int]:
    """(exit code, seconds, largest resident set in bytes) of a process of its own."""
    start = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start, usage.ru_maxrss * 1024


def main(
    folder: Annotated[Path | None, typer.Option(help="Where to put the model; temporary if not given.")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="Solvers to measure.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 8192,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = (folder or Path(temporary)) / "llama-1.1b"
        if not (model / "config.json").exists():
            write_model(model)
        for name in solver or ["rtn", "gptq"]:
            out = Path(temporary) / name
            arguments = ["run", str(model), str(out), "--solver", name, "--calib-tokens", str(tokens)]
            code, seconds, peak = peak_of([sys.executable, "-m", "bitpalette", *arguments])
            print(f"{name}: exit {code}, {seconds:.0f} s, peak resident memory {peak / 2**30:.3f} GiB", flush=True)
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
