"""How Triton launches the KV cache's kernels, and where it says no. Nothing here needs Triton or a GPU.

The kernels themselves are tested by triton_device/kv_*_cases.py, which test_triton_kernels.py runs.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bitpalette.kernels.kv_triton import LEAST_PAGES, MOST_SPLITS, KVTriton, launch_for, padded_width
from bitpalette.quant.kv_format import KVFormat


def test_launches_suit_the_kernel() -> None:
    for batch, kv_heads, rows, pages, head_dim in itertools.product(
        (1, 16, 300), (1, 8), (1, 16, 17, 128), (0, 1, 128, 2048), (8, 64, 80, 256)
    ):
        launch = launch_for(batch, kv_heads, rows, pages, head_dim, 132)
        assert 1 <= launch.splits <= max(1, min(MOST_SPLITS, -(-pages // LEAST_PAGES)))
        assert launch.block_t >= 16  # summands of a matrix instruction
        # four planes of values, in pieces of 8 channels: no more warps than pieces of a plane
        assert launch.warps <= padded_width(head_dim) // 4 // 8


def test_one_row_of_many_tokens_fills_the_gpu() -> None:
    assert launch_for(1, 8, 4, 512, 128, 132).splits * 8 >= 2 * 132
    assert launch_for(16, 8, 4, 512, 128, 132).splits * 16 * 8 >= 2 * 132


def test_no_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = KVTriton().why_not(KVFormat(), 64, 64)
    assert reason == "Triton kernels run on a GPU, and torch sees none"
