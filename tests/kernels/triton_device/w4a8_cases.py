"""y = x W^T with int8 activations: int32 sums are exact, so results are compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bitpalette.kernels.tile_codes import padded, unpack_codes
from bitpalette.kernels.triton_format import TileWeight
from bitpalette.kernels.triton_launch import Launch
from bitpalette.kernels.triton_linear import linear_w4a8

Make = Callable[..., tuple[TileWeight, torch.Tensor]]


def activations(tokens: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(as stored int8 [tokens, KP], scale, natural order int64 [tokens, columns]): any bytes, -128 too."""
    natural = torch.randint(-128, 128, (tokens, columns))
    whole = torch.zeros(tokens, padded(columns), dtype=torch.int64)
    whole[:, :columns] = natural
    stored = whole.view(tokens, -1, 4)[:, :, [0, 2, 1, 3]].reshape(tokens, -1).to(torch.int8)
    return stored.to(device), (torch.rand(tokens) + 0.5).to(device), natural.to(device)


def expected(total: torch.Tensor, packed: TileWeight, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 from exact sums, in the kernel's order of operations."""
    out = total.shape[1]
    y = total.float() * packed.scale[0, :out].float() * scale[:, None]
    return y if bias is None else y + bias.float()


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Exact: both below 2^53 in float64."""
    return (x.double() @ w.double().T).long()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "parts"), [(1, 1), (3, 2), (17, 3), (64, 1)])
def test_per_channel(symmetric: bool, tokens: int, parts: int, weight: Make, device: torch.device) -> None:
    scheme: dict[str, Any] = {"codec": "int", "bits": 4, "group_size": 0, "symmetric": symmetric}
    packed, _ = weight(scheme, (70, 330))
    stored, scale, x = activations(tokens, 330, device)
    codes = unpack_codes(packed.codes, "bits4")[:70, :330].long()
    zero = torch.full((70, 1), 8) if packed.zero_point is None else packed.zero_point[0, :70, None].long()
    total = product(x, codes - zero.to(device))
    launch = Launch(64, 64 if tokens > 17 else 16, 128, parts, 4, 2)
    bias = torch.randn(70, device=device)
    sums = x.sum(1).int()
    y = linear_w4a8(stored, scale, sums, packed, torch.float32, bias, launch=launch)
    torch.testing.assert_close(y, expected(total, packed, scale, bias), rtol=2e-7, atol=1e-6)
    y = linear_w4a8(stored, scale, sums, packed, torch.float32, launch=launch)
    assert torch.equal(y, expected(total, packed, scale, None))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("launch", [None, Launch(128, 16, 64, 1, 4, 2)], ids=["default", "short steps"])
def test_progressive(group: int, launch: Launch | None, weight: Make, device: torch.device) -> None:
    """Weights over the whole of int8: code * group_scale + group_offset from 0 to 255."""
    n, k = 66, 200
    packed, _ = weight({"codec": "int", "bits": 4, "group_size": group, "symmetric": False}, (n, k))
    groups = -(-padded(k) // group)
    times = torch.randint(0, 18, (groups, padded(n)), dtype=torch.uint8)
    plus = (torch.rand(groups, padded(n)) * (256 - 15 * times.float())).floor().to(torch.uint8)
    times[:, 0], plus[:, 0] = 17, 0  # from 0 to 255
    channel = (torch.rand(1, padded(n)) + 0.5).half()
    packed = replace(
        packed, scale=channel.to(device), zero_point=None, group_scale=times.to(device), group_offset=plus.to(device)
    )
    of = torch.arange(k) // group
    codes = unpack_codes(packed.codes, "bits4")[:n, :k].long().cpu()
    w = codes * times[of, :n].T.long() + plus[of, :n].T.long() - 128
    assert int(w.min()) >= -128 and int(w.max()) <= 127
    stored, scale, x = activations(3, k, device)
    y = linear_w4a8(stored, scale, x.sum(1).int(), packed, torch.float32, launch=launch)
    assert torch.equal(y, expected(product(x, w.to(device)), packed, scale, None))


def test_one_hot(weight: Make, device: torch.device) -> None:
    packed, _ = weight({"codec": "int", "bits": 4, "group_size": 0, "symmetric": True}, (64, 128))
    x = torch.eye(128, dtype=torch.int64)
    stored = x.view(128, -1, 4)[:, :, [0, 2, 1, 3]].reshape(128, -1).to(torch.int8).to(device)
    ones = torch.ones(128, device=device)
    packed = replace(packed, scale=torch.ones_like(packed.scale))
    y = linear_w4a8(stored, ones, ones.int(), packed, torch.float16, launch=Launch(64, 64, 128, 1, 4, 2))
    assert torch.equal(y.T.long() + 8, unpack_codes(packed.codes, "bits4").long())


def test_largest_sums(weight: Make, device: torch.device) -> None:
    """Sums near the ends of what int8 can make do not wrap: 1024 * 128 * 15."""
    packed, _ = weight({"codec": "int", "bits": 4, "group_size": 0, "symmetric": True}, (64, 1024))
    packed = replace(packed, codes=torch.full_like(packed.codes, -1), scale=torch.ones_like(packed.scale))
    stored = torch.full((1, 1024), -128, dtype=torch.int8, device=device)
    one, sums = torch.ones(1, device=device), torch.full((1,), -128 * 1024, dtype=torch.int32, device=device)
    y = linear_w4a8(stored, one, sums, packed, torch.float32)
    assert bool((y == -128 * 1024 * 7).all())


def test_other_weights_are_refused(weight: Make, device: torch.device) -> None:
    stored, scale, x = activations(1, 64, device)
    for scheme, reason in (
        ({"codec": "int", "bits": 8}, "4-bit int codes"),
        ({"codec": "int", "bits": 4, "group_size": 64}, "progressive scales"),
    ):
        packed, _ = weight(scheme, (64, 64))
        with pytest.raises(ValueError, match=reason):
            linear_w4a8(stored, scale, x.sum(1).int(), packed, torch.float16)
