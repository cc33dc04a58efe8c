"""Every CUDA kernel once, on small shapes with ragged edges: for compute-sanitizer.

    compute-sanitizer --tool memcheck  --error-exitcode 9 python3 bench/gpu_sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python3 bench/gpu_sanitize.py

Prints a line a format; ends with 1 where a result is not the codec's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import parts_alone  # noqa: F401 - before bitpalette
import torch

from bitpalette.kernel_bench.gpu_contenders import on_device
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernels.cuda_tiles import ACTIVATIONS_VARIABLE, KERNEL
from bitpalette.kernels.cuda_transform import CudaTransform
from bitpalette.quant.codec import get_codec
from bitpalette.quant.order import pack_order
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.scheme import Scheme

SHAPE = (130, 328)
TOKENS = (1, 2, 9, 17, 33, 70, 130, 260)
"""One of each tile of tokens, and one that dequantizes."""

SCHEMES: list[tuple[dict[str, Any], str]] = [
    *(({"codec": "int", "bits": bits, "group_size": 64}, "16bit") for bits in (2, 3, 4, 8)),
    ({"codec": "int", "bits": 4, "group_size": 32, "symmetric": False}, "16bit"),
    ({"codec": "int", "bits": 3, "symmetric": False}, "16bit"),
    *(({"codec": "lut", "entries": entries, "group_size": 64}, "16bit") for entries in (4, 8, 16)),
    ({"codec": "float", "element": "e4m3"}, "16bit"),
    *(({"codec": "trellis", "rate": m / 16, "window": 16}, "16bit") for m in (32, 40, 49)),
    *(({"codec": "int", "bits": bits}, "int8") for bits in (4, 8)),
    ({"codec": "int", "bits": 4, "group_size": 64}, "int8"),
    ({"codec": "int", "bits": 4, "group_size": 64, "progressive": True}, "16bit"),
    *(({"codec": "trellis", "rate": m / 16, "window": 16}, form) for m in (32, 49) for form in ("int8", "exact")),
]


def product(values: dict[str, Any], form: str, device: torch.device) -> float:
    """The largest relative error of the products of one weight; NaN for a result that is not finite."""
    scheme = Scheme.from_dict(values)
    qt = random_weight(scheme, SHAPE, torch.Generator().manual_seed(1))
    w = get_codec(scheme.codec).decode(qt).double()
    os.environ[ACTIVATIONS_VARIABLE] = form
    packed = KERNEL.prepare(on_device(qt, device))
    largest = 0.0
    for i, tokens in enumerate(TOKENS):
        dtype = (torch.float16, torch.bfloat16)[i % 2]
        x, bias = torch.randn(tokens, SHAPE[1]).to(dtype), torch.randn(SHAPE[0]).to(dtype)
        want = x.double() @ w.T + bias.double()
        y = KERNEL.linear(x.to(device), packed, bias.to(device)).cpu().double()
        largest = max(largest, float((y - want).norm() / want.norm()))
        if not y.isfinite().all():
            return float("nan")
    index = torch.tensor([0, 129, 64])
    same = torch.equal(KERNEL.rows(packed, index.to(device)).cpu(), w[index].float())
    return largest if same else float("nan")


def transforms(device: torch.device) -> None:
    for n in (97, 576, 1536, 14336):
        fields = {
            "input_scale": (torch.rand(n) + 0.5).half().to(device),
            "signs": random_signs(1, n).to(device),
            "order": pack_order(torch.randperm(n)).to(device),
        }
        transform = CudaTransform(("scale", "rotate", "order"), fields, n, device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(3, n, device=device).to(dtype)
            transform.apply(x)
            transform.quantize(x, planes=False)
            transform.quantize(x, planes=True)


def main() -> int:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reason = KERNEL.why_not(Scheme.from_dict(SCHEMES[0][0]), SHAPE, device)
    if reason is not None:
        print(f"the CUDA kernels cannot run: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    wrong = 0
    for values, form in SCHEMES:
        error = product(values, form, device)
        allowed = 0.03 if form == "int8" or values.get("progressive") else 8e-3
        fine = error <= allowed
        wrong += not fine
        print(f"{'ok   ' if fine else 'WRONG'} {error:.1e} {form} {values}", flush=True)
    transforms(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
