"""Activations as int8, and the transforms of a layer's input, against quant's own."""

from __future__ import annotations

import pytest
import torch

from bitpalette.kernels.tile_codes import padded
from bitpalette.kernels.triton_activations import quantize_activations
from bitpalette.kernels.triton_transform import rotation_split, triton_transform, why_not_transform
from bitpalette.quant.order import pack_order
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.transform import get_transform

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 64, 576, 5000])
def test_quantize(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(columns)
    x = (torch.randn(3, columns, device=device) * torch.tensor([[1e-3], [1.0], [300.0]], device=device)).to(dtype)
    codes, scale, sums = quantize_activations(x)
    width = padded(columns)
    assert codes.shape == (3, width) and codes.dtype == torch.int8
    natural = codes.view(3, -1, 4)[:, :, [0, 2, 1, 3]].reshape(3, -1)
    assert bool((natural[:, columns:] == 0).all())
    largest = x.float().abs().amax(1)
    assert torch.equal(scale, largest / 127)
    expected = (x.float() * (127 / largest)[:, None]).round()  # to even
    assert torch.equal(natural[:, :columns].float(), expected)
    assert torch.equal(sums.long(), natural.long().sum(1))


def test_tokens_of_zeros_and_wrong_ones(device: torch.device) -> None:
    x = torch.ones(4, 100, device=device)
    x[0] = 0
    x[1, 99] = torch.inf
    x[2, 3] = torch.nan
    codes, scale, sums = quantize_activations(x)
    assert not codes[0].any() and float(scale[0]) == 0 and int(sums[0]) == 0
    assert bool(scale[1:3].isnan().all())
    assert float(scale[3]) == float(torch.tensor(1.0) / 127) and int(sums[3]) == 12700


@pytest.mark.parametrize("columns", [1, 2, 9, 24, 64, 97, 144, 576, 896, 4096])
def test_rotate(columns: int, device: torch.device) -> None:
    torch.manual_seed(columns)
    fields = {"signs": random_signs(5, columns).to(device)}
    transform = triton_transform(("rotate",), fields, columns, device)
    x = torch.randn(3, columns, device=device)
    expected = get_transform("rotate").apply_input(x.double().float(), fields)
    y = transform.apply(x)
    assert bool(((y - expected).abs() <= 3e-6 * expected.norm(dim=1, keepdim=True)).all())
    half = x.half()
    assert transform.apply(half).dtype == torch.float16
    expected = get_transform("rotate").apply_input(half.float(), fields)
    wrong = (transform.apply(half).float() - expected).abs()
    assert bool((wrong <= 2**-11 * expected.abs() + 1e-5 * columns**0.5).all())


def test_rotation_is_its_own_inverse(device: torch.device) -> None:
    fields = {"signs": torch.zeros(-(-576 // 8), dtype=torch.uint8, device=device)}
    transform = triton_transform(("rotate",), fields, 576, device)
    x = torch.eye(64, 576, device=device)
    assert bool(((transform.apply(transform.apply(x)) - x).abs() <= 1e-6).all())


def test_all_transforms_in_order(device: torch.device) -> None:
    torch.manual_seed(1)
    n = 72
    fields = {
        "input_scale": (torch.rand(n) + 0.5).half().to(device),
        "signs": random_signs(2, n).to(device),
        "order": pack_order(torch.randperm(n)).to(device),
    }
    x = torch.randn(5, n, device=device)
    for names in (("scale",), ("order",), ("scale", "rotate", "order"), ()):
        expected = x
        for name in names:
            expected = get_transform(name).apply_input(expected, fields)
        y = triton_transform(names, fields, n, device).apply(x)
        assert bool(((y - expected).abs() <= 1e-5).all()), names


def test_no_tokens(device: torch.device) -> None:
    fields = {"signs": random_signs(0, 24).to(device)}
    assert triton_transform(("rotate",), fields, 24, device).apply(torch.empty(0, 24, device=device)).shape == (0, 24)
    assert [len(t) for t in quantize_activations(torch.empty(0, 24, device=device))] == [0, 0, 0]


def test_splits_are_even() -> None:
    splits = {4096: (64, 64), 14336: (112, 128), 11008: (86, 128), 576: (18, 32), 97: (1, 97), 1: (1, 1)}
    assert {n: rotation_split(n) for n in splits} == splits


def test_what_triton_leaves_to_torch() -> None:
    assert why_not_transform(("rotate", "order"), 1023 * 64) is None
    reason = why_not_transform(("rotate",), 1025 * 64)
    assert reason is not None and "odd part above 1024" in reason
