"""Random weights in tiles, and the device that runs Triton kernels: a GPU, or a CPU under TRITON_INTERPRET=1.

Triton decides when it is imported whether kernels are interpreted, and torch may import it at any time. So these files
are not collected with the other tests: `test_triton_kernels.py` runs them in a process of their own.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpalette.kernels.tiles import pack_tiles
from bitpalette.kernels.triton_format import TileWeight, tile_weight
from bitpalette.kernels.triton_runtime import interpreting
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import get_codec
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.tensor import QuantizedTensor, field_specs

if interpreting():
    _spec = importlib.util.spec_from_file_location("repairs", Path(__file__).with_name("interpreter_repairs.py"))
    assert _spec is not None and _spec.loader is not None
    _repairs = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_repairs)
    _repairs.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    if interpreting():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    return torch.device("cuda")


def random_fields(scheme: Scheme, shape: tuple[int, int], powers: bool) -> dict[str, torch.Tensor]:
    """Fields of any code, with scales of both signs; powers: scales are powers of two, so that sums can be exact."""
    fields = {}
    for name, (size, dtype) in field_specs(scheme, shape).items():
        if name == "codes" and scheme.codec != "trellis":
            bits: int = scheme.bits  # type: ignore[attr-defined]
            top: int = getattr(scheme, "entries", 1 << bits)
            codes = torch.randint(0, top, shape, dtype=torch.uint8)
            if getattr(scheme, "element", "") == "e4m3":
                codes[codes & 0x7F == 0x7F] = 0x35  # NaN, which no weight is
            fields[name] = pack_bits(codes, bits).flatten()
        elif name == "zero_point":
            groups = field_specs(scheme, shape)["scale"][0][1]
            bits = scheme.bits  # type: ignore[attr-defined]
            fields[name] = pack_bits(torch.randint(0, 1 << bits, (shape[0], groups), dtype=torch.uint8), bits)
        elif name == "scale":
            sign = torch.randint(0, 2, size) * 2 - 1
            scale = 2.0 ** torch.randint(-4, 0, size) if powers else torch.rand(size) * 0.1 + 0.01
            fields[name] = (sign * scale).to(dtype)
        elif name == "table":
            fields[name] = torch.randn(size).sort().values.to(dtype)
        else:
            fields[name] = torch.randint(0, 256, size, dtype=dtype)
    return fields


@pytest.fixture
def weight(device: torch.device) -> Callable[..., tuple[TileWeight, torch.Tensor]]:
    """weight(scheme, shape, powers=False) -> (weight in tiles, what the codec decodes as float64), random codes."""

    def make(values: dict[str, Any], shape: tuple[int, int], powers: bool = False) -> tuple[TileWeight, torch.Tensor]:
        torch.manual_seed(zlib.crc32(repr((values, shape)).encode()))
        scheme = Scheme.from_dict(values)
        qt = QuantizedTensor(scheme, shape, random_fields(scheme, shape, powers))
        tensors = {name: t.to(device) for name, t in pack_tiles(qt).items()}
        return tile_weight(scheme, shape, tensors), get_codec(scheme.codec).decode(qt).double().to(device)

    return make
