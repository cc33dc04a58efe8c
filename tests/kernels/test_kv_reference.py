"""Attention over packed pages against plain attention in float64 over the same stored values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels import kv_reference
from bitpalette.kernels.kv_reference import attention
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.kv_token import decode, encode, rotate


def expected(
    form: KVFormat,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: int,
    mean: Tensor | None,
    softcap: float | None = None,
    sliding: int | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """One row, q [heads, n, D], k, v [kv_heads, length, D] with the last n new; float64 [heads, n, Dv]."""

    def side(x: Tensor, bits: int, center: Tensor | None, unbiased: bool) -> Tensor:
        if bits == 16:
            return x.double()
        z = rotate(x.float() if center is None else x.float() - center[:, None]).to(k.dtype)
        quantized = decode(*encode(z, bits, unbiased), bits)
        place = torch.arange(x.shape[1])
        packed = (place >= form.sinks) & (place < history - form.window)
        return rotate(torch.where(packed[:, None], quantized.double(), z.double()))

    k, v = side(k, form.bits_k, mean, True), side(v, form.bits_v, None, False)
    groups, n, length = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    score = q.double() @ k.repeat_interleave(groups, 0).mT / math.sqrt(q.shape[-1])
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    behind = torch.arange(length - n, length)[:, None] - torch.arange(length)
    unseen = behind < 0
    if sliding is not None:
        unseen |= behind >= sliding
    score = score.masked_fill(unseen, -math.inf)
    if logits is not None:
        score = torch.cat((score, logits.double()[:, None, None].expand(-1, n, 1)), -1)
        weight = score.softmax(-1)[..., :-1]
    else:
        weight = score.softmax(-1)
    return weight @ v.repeat_interleave(groups, 0)


CASES = [
    # form, batch lengths before, new tokens, kv_heads, group, D, Dv
    (KVFormat(4, 4, 4, 64), (200, 63), 1, 2, 4, 64, 64),
    (KVFormat(3, 2, 4, 8), (129, 17), 4, 1, 8, 80, 80),
    (KVFormat(2, 2, 0, 0), (64, 65), 3, 3, 1, 96, 96),
    (KVFormat(8, 3, 4, 16), (1, 700), 2, 2, 3, 128, 64),
    (KVFormat(16, 4, 4, 16), (150, 100), 1, 1, 16, 64, 64),
    (KVFormat(4, 16, 2, 5), (150, 100), 5, 2, 2, 256, 256),
    (KVFormat(16, 16, 4, 16), (150, 0), 300, 1, 2, 24, 24),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}, {c[1]}+{c[2]}, {c[3:]}")
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0}, {"sliding_window": 40}, {"sink_logits": True}],
    ids=["plain", "cap", "slide", "sink"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_plain_attention(case, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    form, lengths, n, kv_heads, group, width, width_v = case
    monkeypatch.setattr(kv_reference, "QUERIES_AT_ONCE", 100)
    monkeypatch.setattr(kv_reference, "PAGES_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(n)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    batch, most = len(lengths), max(lengths)
    mean = draw(kv_heads, width) * 2 if form.bits_k < 16 else None
    k, v = (draw(batch, kv_heads, most + n, width).bfloat16() for width in (width, width_v))
    q = draw(batch, kv_heads * group, n, width)
    skip = np.array([most - length for length in lengths])
    rows = KVRows(form, batch, kv_heads, width, width_v, torch.bfloat16, torch.device("cpu"), mean)
    if most:
        rows.append(*rows.stored(k[:, :, :most], v[:, :, :most]), skip)
    if "sink_logits" in options:
        options = {"sink_logits": draw(kv_heads * group)}
    new = rows.stored(k[:, :, most:], v[:, :, most:])
    out = attention(q, rows, new, np.zeros(batch, np.int64), width**-0.5, dtype=dtype, **options)
    assert out.dtype == dtype and out.shape == (batch, kv_heads * group, n, width_v)
    names = {"sliding_window": "sliding", "sink_logits": "logits"}
    for b, length in enumerate(lengths):
        more = {names.get(name, name): value for name, value in options.items()}
        right = expected(form, q[b], k[b, :, most - length :], v[b, :, most - length :], length, mean, **more)
        error = (out[b] - right).abs().max() / right.abs().max()
        assert (error <= (1e-6 if dtype == torch.float64 else 2e-5)).all()


def test_padded_queries_are_zero_and_see_nothing() -> None:
    form = KVFormat(4, 4, 2, 4)
    k, v = torch.randn(2, 2, 1, 6, 16)
    k[1, :, :4], v[1, :, :4] = float("nan"), float("nan")  # padding may be anything
    rows = KVRows(form, 2, 1, 16, 16, torch.float32, torch.device("cpu"))
    q = torch.randn(2, 2, 6, 16)
    skip = np.array([0, 4])
    out = attention(q, rows, rows.stored(k, v), skip, 0.25)
    assert torch.equal(out[1, :, :4], torch.zeros(2, 4, 16)) and out.isfinite().all()
    alone = KVRows(form, 1, 1, 16, 16, torch.float32, torch.device("cpu"))
    right = attention(q[1:, :, 4:], alone, alone.stored(k[1:, :, 4:], v[1:, :, 4:]), np.zeros(1, np.int64), 0.25)
    assert (out[1:, :, 4:] - right).abs().max() <= 1e-6


def test_appended_first() -> None:
    """new=None: the last tokens of the rows are those of the queries."""
    rows = KVRows(KVFormat(16, 16, 0, 4), 1, 1, 16, 16, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, 1, 1, 80, 16)
    q, none = torch.randn(1, 1, 3, 16), np.zeros(1, np.int64)
    rows.append(*rows.stored(k[:, :, :77], v[:, :, :77]), none)
    new = rows.stored(k[:, :, 77:], v[:, :, 77:])
    before = attention(q, rows, new, none, 0.25)
    rows.append(*new, none)
    assert (attention(q, rows, None, none, 0.25) - before).abs().max() <= 1e-6


def test_nan_in_the_cache_is_nan_in_the_output() -> None:
    rows = KVRows(KVFormat(4, 4, 0, 0), 1, 1, 16, 16, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, 1, 1, 70, 16)
    k[0, 0, 30, 3] = float("nan")
    none = np.zeros(1, np.int64)
    rows.append(*rows.stored(k, v), none)
    assert attention(torch.randn(1, 2, 1, 16), rows, None, none, 0.25).isnan().all()
