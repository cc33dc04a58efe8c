"""bfloat16 under the interpreter: with its repairs it does what a GPU does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def convert_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def test_product_of_bfloat16(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=device).bfloat16() for _ in range(2))
    c = torch.empty(16, 16, device=device)
    product_kernel[(1,)](a, b, c, SIZE=16)
    assert bool(((c - a.float() @ b.float()).abs() <= 1e-5).all())


def test_conversions_round_to_nearest_even(device: torch.device) -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x00018000, 0])
    x = bits.to(torch.int32).view(torch.float32).to(device)
    x = torch.cat([x, -x])
    y = torch.empty(16, device=device, dtype=torch.bfloat16)
    convert_kernel[(1,)](x, y, SIZE=16)
    assert torch.equal(y, x.bfloat16())
    back = torch.empty(16, device=device)
    convert_kernel[(1,)](y, back, SIZE=16)
    assert torch.equal(back, y.float())
    whole = torch.arange(-300, 212, 32, device=device, dtype=torch.int32)
    convert_kernel[(1,)](whole, y, SIZE=16)
    assert torch.equal(y, whole.bfloat16())
    convert_kernel[(1,)](torch.tensor([torch.nan] * 16, device=device), y, SIZE=16)
    assert bool(y.isnan().all())
