"""kv_append, centered and rotated, against quant/kv_token.py to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bitpalette.quant.hartley import hartley_matrix
from bitpalette.quant.kv_token import STEP, encode, pack, packed_bytes, rotate

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
SOURCES = [CUDA / "kv_append.cu", HERE / "kv_append_entry.cpp"]
RACE = "data race"
WRONG = "differs"

MUTATIONS = {
    "kv_append_missing_sync": {"plain": WRONG, "tsan": RACE},
}


def check(executor: Any, defines: list[str]) -> None:
    library = executor.build(SOURCES, defines=defines)
    guarded, g = executor.guarded, torch.Generator().manual_seed(0)
    heads, width, tokens, pages = 3, 80, 5, 2
    x = torch.randn(tokens, heads, width, generator=g)
    mean = torch.randn(heads, width, generator=g)
    slots = torch.tensor([70, 3, -1, 127, 64])
    for bits in (3, 8):
        numbers = [0, heads * width, width, tokens, heads, width, 1, 5, 4, pages, bits, 1]
        reals = torch.tensor([0.25, STEP[bits]], dtype=torch.float32)
        codes = torch.full((pages, heads, 64, packed_bytes(width, bits)), 255, dtype=torch.uint8)
        gain = torch.full((pages, heads, 64), math.pi, dtype=torch.float16)
        want_codes, want_gain = codes.clone(), gain.clone()
        c, gains = encode(rotate(x - mean), bits, True)
        there = slots >= 0
        at = slots[there] // 64, slots[there] % 64
        want_codes[at[0], :, at[1]], want_gain[at[0], :, at[1]] = pack(c, bits)[there], gains[there]
        for options in executor.all_options():
            out_codes, out_gain = guarded(codes), guarded(gain)
            inputs = [guarded(torch.tensor(numbers)), guarded(reals), guarded(x), guarded(mean)]
            matrix, at_slots = guarded(hartley_matrix(5, 0, torch.device("cpu"))), guarded(slots)
            library.call("run_kv_append", *inputs, matrix, at_slots, out_codes, out_gain, options=options)
            assert torch.equal(out_gain.tensor, want_gain), f"gain differs, {bits} bits, {options}"
            assert torch.equal(out_codes.tensor, want_codes), f"codes differs, {bits} bits, {options}"
