"""A weight that was never encoded: the codec's fields filled at random, with tables and scales as real ones have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.bitstream import pack_bits
from ..quant.float import FloatScheme
from ..quant.gaussian_grid import gaussian_grid
from ..quant.lloyd import lloyd_max
from ..quant.lut import LutScheme, nf4
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor, field_specs

SCALE = 0.01
"""About that of a weight of a language model: products stay well within half precision."""


def random_weight(scheme: Scheme, shape: tuple[int, int], generator: torch.Generator) -> QuantizedTensor:
    """Any bytes are codes of some weight, NaN in float apart, so none is searched for. SchemeError for a misfit.

    The fields are on the generator's device.
    """
    device = generator.device
    fields: dict[str, Tensor] = {}
    for name, (size, dtype) in field_specs(scheme, shape).items():
        if name == "table" and isinstance(scheme, LutScheme):
            fields[name] = _table(scheme, size, generator).to(device)
        elif name == "codes" and isinstance(scheme, LutScheme) and scheme.entries & (scheme.entries - 1):
            fields[name] = _codes_below(scheme, shape, generator)
        elif isinstance(scheme, FloatScheme) and dtype == torch.uint8:
            fields[name] = _finite_bytes(scheme, name, size, generator)
        elif name == "group_scale":  # up to 7 goes with any zero point
            fields[name] = torch.randint(1, 8, size, dtype=dtype, generator=generator, device=device)
        elif dtype.is_floating_point:
            fields[name] = (SCALE * (0.5 + torch.rand(size, generator=generator, device=device))).to(dtype)
        else:
            fields[name] = torch.randint(0, 256, size, dtype=dtype, generator=generator, device=device)
    return QuantizedTensor(scheme, shape, fields)


def _table(scheme: LutScheme, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float16 of `size`: the levels that the scheme fixes; for k-means, sorted samples of N(0, 1)."""
    if scheme.dims == 2:
        levels = torch.tensor(gaussian_grid(scheme.entries))
    elif scheme.table == "kmeans":
        levels = torch.randn(size, generator=generator, device=generator.device).sort(-1).values
    elif scheme.table == "values":
        levels = torch.tensor(scheme.values)
    else:
        levels = torch.tensor(nf4() if scheme.table == "nf4" else lloyd_max(scheme.entries))
    return levels.to(torch.float16)


def _finite_bytes(scheme: FloatScheme, name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Codes of numbers: e4m3 has NaN at 0x7F and 0xFF. Scales are positive, of the size that weights need."""
    if name == "scale":
        low, high = (118, 122) if scheme.scale_format == "e8m0" else (0x30, 0x40)
        return torch.randint(low, high, size, dtype=torch.uint8, generator=generator, device=generator.device)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=generator.device)
    return codes ^ (codes & 0x7F == 0x7F).to(torch.uint8) if scheme.element == "e4m3" else codes


def _codes_below(scheme: LutScheme, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Codes of a table whose size is no power of two: bytes at random would point beyond it."""
    size = (shape[0], -(-shape[1] // scheme.dims))
    codes = torch.randint(0, scheme.entries, size, dtype=torch.uint8, generator=generator, device=generator.device)
    return pack_bits(codes, scheme.bits).flatten()
