"""What takes part in a measurement: a linear kernel with one weight, of which it can make more copies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.base import Kernel, Packed
from ..kernels.isa import OnInstructionSet
from ..kernels.registry import kernels
from ..quant.codec import get_codec
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor

Call = Callable[[Any], Any]
"""y for x, by one copy of a weight."""

ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error that rounding the output to a type adds to the codec's tolerance."""

CPU = torch.device("cpu")


@dataclass
class Expected:
    """What a kernel must compute from the first rows of the input, and how far it may be off."""

    y: Tensor  # float32 [most tokens, out]
    scale: Tensor  # float32 [most tokens]: |x| |W| / sqrt(in), the size that an output row of random signs has
    tolerance: float

    def error(self, y: Tensor) -> float:
        """||y - expected|| / ||expected|| for y [tokens, out]; the smaller where outputs are near zero by chance."""
        tokens = y.shape[0]
        expected, scale = self.y[:tokens], float(self.scale[:tokens].norm())
        return float((y.float() - expected).norm()) / max(float(expected.norm()), scale, 1e-30)


@dataclass
class Contender:
    """A kernel and its weight [out, in]. to_input brings x, float32 [tokens, in], into what a copy is called with."""

    kernel: str
    scheme: str
    isa: str
    """The instruction set it is built for; empty where the library chooses."""
    dtype: str
    shape: tuple[int, int]
    nbytes: int
    """Of one copy of the weight, as it is read."""
    first: Call
    """A copy that is checked and warms up, and is not timed."""
    new_copy: Callable[[], Call]
    to_input: Callable[[Tensor], Any]
    expected: Expected | None = None


@dataclass(frozen=True)
class Absent:
    """A kernel that cannot take part, and why."""

    kernel: str
    scheme: str
    reason: str


def scheme_label(scheme: Scheme) -> str:
    """As `str` of it, with its rate even where that is the default: "int bits=4 group_size=128"."""
    rates = [f"{k}={getattr(scheme, k):g}" for k in ("bits", "entries", "rate") if k in scheme.__dataclass_fields__]
    rest = [f"{k}={v}" for k, v in scheme.to_dict().items() if k not in ("codec", "bits", "entries", "rate")]
    return " ".join([scheme.codec, *rates, *rest])


def variants(scheme: Scheme, shape: tuple[int, int], names: list[str], isas: list[str]) -> Iterator[tuple[str, Kernel]]:
    """(instruction set, kernel) of the registered kernels among `names` that run the scheme on this CPU."""
    for name, kernel in kernels().items():
        if name not in names or kernel.why_not(scheme, shape, CPU) is not None:
            continue
        if isinstance(kernel, OnInstructionSet):
            yield from ((isa, type(kernel)(isa)) for isa in isas)
        else:
            yield "", kernel


def packed_contender(
    kernel: Kernel, isa: str, qt: QuantizedTensor, dtype: torch.dtype, expected: Expected
) -> Contender:
    """`kernel` with its own layout of qt, for inputs of `dtype`."""
    master = clone(kernel.prepare(qt))  # a kernel that shared qt's fields would read what another has just read
    return Contender(
        kernel=kernel.name,
        scheme=scheme_label(qt.scheme),
        isa=isa,
        dtype=str(dtype).removeprefix("torch."),
        shape=master.shape,
        nbytes=master.nbytes,
        first=_linear(kernel, master),
        new_copy=lambda: _linear(kernel, clone(master)),
        to_input=lambda x: x.to(dtype),
        expected=expected,
    )


def _linear(kernel: Kernel, packed: Packed) -> Call:
    return lambda x: kernel.linear(x, packed, None)


def clone(packed: Packed) -> Packed:
    """A copy in memory of its own, with nothing that a kernel kept."""
    return dataclasses.replace(packed, tensors={k: t.clone() for k, t in packed.tensors.items()}, handle=None)


def expected_output(qt: QuantizedTensor, x: Tensor, dtype: torch.dtype) -> Expected:
    """What the codec itself says of x float32 [tokens, in], rounded to `dtype` first as the kernels get it."""
    codec = get_codec(qt.scheme.codec)
    z = x.to(dtype).float()
    w = codec.decode(qt)
    scale = z.norm(dim=1) * float(w.norm()) / math.sqrt(qt.shape[1])
    return Expected(z @ w.T, scale, codec.tolerance(qt.scheme) + ROUNDING[dtype])
