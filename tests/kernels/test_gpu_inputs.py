"""Around the products, on a GPU: transforms of inputs, weights written out, rows of an embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.cuda_transform import MOST_ODD, CudaTransform
from bitpalette.quant.bitstream import unpack_bits
from bitpalette.quant.hartley import odd_part
from bitpalette.quant.native import DTYPES as DTYPE_NUMBERS
from bitpalette.quant.order import pack_order
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.scheme import Scheme

pytestmark = pytest.mark.gpu

WIDTHS = [1, 24, 97, 576, 1536, 1537, 4096, 8960, 11008, 14336, 28672]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = 4e-6
"""Of a row's norm: float32 sums in a rotation."""


def rotated(x: Tensor) -> Tensor:
    """float64: the Hartley-Hadamard transform of x [rows, n] as it is defined, butterflies and a dense odd part."""
    odd, log2 = odd_part(x.shape[1])
    y = x.double()
    for i in range(log2):
        y = y.view(len(x), -1, 2, 1 << i)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2) / math.sqrt(2)
    index = torch.arange(odd, device=x.device)
    angle = (2 * math.pi / odd) * (index[:, None] * index % odd).double()
    return ((angle.cos() + angle.sin()) / math.sqrt(odd) @ y.reshape(len(x), odd, -1)).reshape(len(x), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_transforms(cuda_kernel: Any, n: int, dtype: torch.dtype, guards: Any, gpu: torch.device) -> None:
    torch.manual_seed(n)
    order = torch.randperm(n)
    fields = {
        "input_scale": (torch.rand(n) + 0.5).half().to(gpu),
        "signs": random_signs(3, n).to(gpu),
        "order": pack_order(order).to(gpu),
    }
    signs = 1 - 2 * unpack_bits(fields["signs"][None].cpu(), n, 1)[0].double().to(gpu)
    for names in (("rotate",), ("scale",), ("order",), ("scale", "rotate", "order")):
        if cuda_kernel.why_not_transform(names, n) is not None:
            assert odd_part(n)[0] > MOST_ODD and "rotate" in names
            continue
        transform = CudaTransform(names, fields, n, gpu)
        for tokens in (1, 17):
            with guards() as g:
                x = g.copy(torch.randn(tokens, n, device=gpu).to(dtype))
                want = x.double()
                if "scale" in names:
                    want = want * fields["input_scale"].float().reciprocal().double()
                if "rotate" in names:
                    want = rotated(want * signs)
                if "order" in names:
                    want = want[:, order.to(gpu)]
                y = transform.apply(x)
                assert not bool(y[:, n:].any()) and y.shape[1] % 64 == 0
                sums = SUMS * want.norm(dim=1, keepdim=True) if "rotate" in names else 0
                allowed = EPSILON[dtype] * want.abs() + sums + 1e-7
                assert bool(((y[:, :n].double() - want).abs() <= allowed).all()), (names, tokens)
                codes = transform.quantize(x, planes=False)
                values = codes.codes.view(tokens, -1, 4)[:, :, [0, 2, 1, 3]].reshape(tokens, -1)[:, :n].double()
                step = codes.scale.double()[:, None]
                assert torch.equal(codes.sum.long(), values.sum(1).long())
                assert bool(((values * step - want).abs() <= 0.501 * step + sums).all()), (names, tokens)


def test_a_rotation_is_its_own_inverse(cuda_kernel: Any, gpu: torch.device) -> None:
    for n in (576, 8960):
        fields = {"signs": torch.zeros(-(-n // 8), dtype=torch.uint8, device=gpu)}
        transform = CudaTransform(("rotate",), fields, n, gpu)
        x = torch.randn(5, n, device=gpu)
        again = transform.apply(transform.apply(x)[:, :n].contiguous())[:, :n]
        assert bool(((again - x).abs() <= 1e-5).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_written_out(
    cuda_kernel: Any,
    gpu_scheme: Scheme,
    dtype: torch.dtype,
    gpu_weight: Callable[..., Any],
    guards: Any,
    gpu: torch.device,
) -> None:
    """Bit for bit what the codec decodes, rounded once; rows likewise, in float32."""
    for shape in [(1, 8), (123, 577), (130, 648)]:
        with guards() as g:
            weight = gpu_weight(cuda_kernel, gpu_scheme, shape, g)
            if weight is None:
                continue
            out = g.empty(shape, dtype, gpu)
            stream = torch.cuda.current_stream(gpu).cuda_stream if gpu.type == "cuda" else 0
            native = cuda_kernel.weight(weight.packed).native
            native.dequantize(out.data_ptr(), DTYPE_NUMBERS[dtype], stream)
            assert torch.equal(out, weight.decoded.to(dtype)), shape
            index = torch.randint(0, shape[0], (37,), device=gpu)
            assert torch.equal(cuda_kernel.rows(weight.packed, index), weight.decoded[index].float())
            assert cuda_kernel.rows(weight.packed, index[:0]).shape == (0, shape[1])


def test_an_embedding(gpu: torch.device, cuda_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer on the GPU gives the rows of the layer on the CPU, transforms undone."""
    from bitpalette.kernels.embedding import QuantEmbedding
    from bitpalette.quant.solver import quantize_tensor

    for values in (
        {"codec": "int", "bits": 4, "group_size": 64, "transforms": ["rotate"]},
        {"codec": "trellis", "rate": 3.0, "window": 12, "transforms": ["rotate"]},
    ):
        qt = quantize_tensor(torch.randn(203, 576), values)
        ids = torch.randint(0, 203, (3, 50))
        want = QuantEmbedding.from_tensor(qt).look_up(ids)
        layer = QuantEmbedding.from_tensor(qt).to(gpu)
        layer.serve_linear()
        rows = layer(ids.to(gpu))
        assert layer.kernel_names == {"weight": "cuda"}
        assert bool(((rows.cpu() - want).abs() <= 1e-5 * want.abs().max()).all())
