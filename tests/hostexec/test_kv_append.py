"""kv_append and kv_rotate on the host executor: to the bit what quant/kv_token.py gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.quant.hartley import hartley_matrix, odd_part
from bitpalette.quant.kv_token import STEP, encode, pack, packed_bytes, rotate

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def library(hostexec: Any) -> Any:
    return hostexec.build([CUDA / "kv_append.cu", HERE / "kv_append_entry.cpp"])


def inputs(hostexec: Any, x: Tensor, mean: Tensor | None, turn: bool, *last: int) -> list[Any]:
    """Of run_kv_append and run_kv_rotate. last: pages, bits, unbiased."""
    tokens, heads, width = x.shape
    odd, log2 = odd_part(width)
    numbers = [DTYPES[x.dtype], x.stride(0), x.stride(1), tokens, heads, width, turn, odd, log2, *last]
    reals = [1 / math.sqrt(1 << log2), STEP.get(last[1], 0.0)]
    matrix = hartley_matrix(odd, 0, torch.device("cpu")) if odd > 1 and turn else None
    tensors = [torch.tensor(numbers, dtype=torch.int64), torch.tensor(reals, dtype=torch.float32), x, mean, matrix]
    return [None if t is None else hostexec.guarded(t) for t in tensors]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
def test_codes_and_gains_to_the_bit(hostexec: Any, library: Any, bits: int, width: int) -> None:
    g = torch.Generator().manual_seed(width)
    tokens, heads = 70, 2
    x = torch.randn(tokens, heads, width, generator=g) * torch.exp(torch.randn(tokens, heads, 1, generator=g) * 3)
    x[1, 0], x[2, 1, 3], x[3, 0, 5] = 0, math.nan, -math.inf
    x[4, 1] = 3e4 * x[4, 1].sign()
    slots = torch.randperm(128, generator=g)[:tokens]
    slots[9], slots[11] = -1, 128
    there = (slots >= 0) & (slots < 128)
    at = slots[there] // 64, slots[there] % 64
    for unbiased, turn, dtype in (
        (True, True, torch.float32),
        (False, True, torch.bfloat16),
        (True, False, torch.half),
    ):
        y = x.to(dtype)
        mean = torch.randn(heads, width, generator=g) if unbiased else None
        z = y.float() if mean is None else y.float() - mean
        c, gains = encode(rotate(z) if turn else z, bits, unbiased)
        codes = torch.full((2, heads, 64, packed_bytes(width, bits)), 255, dtype=torch.uint8)
        gain = torch.full((2, heads, 64), math.pi, dtype=torch.float16)
        want_codes, want_gain = codes.clone(), gain.clone()
        want_codes[at[0], :, at[1]], want_gain[at[0], :, at[1]] = pack(c, bits)[there], gains[there]
        out_codes, out_gain = hostexec.guarded(codes), hostexec.guarded(gain)
        arguments = inputs(hostexec, y, mean, turn, 2, bits, unbiased)
        library.call("run_kv_append", *arguments, hostexec.guarded(slots), out_codes, out_gain)
        torch.testing.assert_close(out_gain.tensor, want_gain, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out_codes.tensor, want_codes)


@pytest.mark.parametrize("width", [16, 80, 128, 208])
def test_rotation_to_the_bit(hostexec: Any, library: Any, width: int) -> None:
    g = torch.Generator().manual_seed(width)
    x, mean = torch.randn(5, 3, width, generator=g), torch.randn(3, width, generator=g)
    for dtype in DTYPES:
        z = hostexec.guarded(torch.full_like(x, math.nan, dtype=dtype))
        library.call("run_kv_rotate", *inputs(hostexec, x, mean, True, 0, 0, 0), z, DTYPES[dtype])
        assert torch.equal(z.tensor, rotate(x - mean).to(dtype))


def test_a_wrong_call_is_refused_with_its_numbers(hostexec: Any, library: Any) -> None:
    z = hostexec.guarded(torch.zeros(1, 1, 24))
    with pytest.raises(RuntimeError, match="returned -1"):
        library.call("run_kv_rotate", *inputs(hostexec, torch.zeros(1, 1, 24), None, True, 0, 0, 0), z, 0)
    text = hostexec.guarded(torch.zeros(512, dtype=torch.uint8))
    library.call("refused", text, 512)
    assert "[1, 1, 24]; the last is a multiple of 16" in bytes(text.array).rstrip(b"\0").decode()
