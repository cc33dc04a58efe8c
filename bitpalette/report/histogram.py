"""Histograms of a weight before and after the transforms that its codec sees it through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.skeleton import Skeleton
from ..calibrate.structure import quantizable
from ..formats.base import open_source
from ..formats.errors import FormatError
from ..formats.native import NativeSource, open_native, stored_name
from ..quant.transform import get_transform

REACH = 8.0
"""Histograms end at so many standard deviations; what lies beyond is counted in the outermost bins."""
BINS = 96
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Shape:
    """Of a weight's values in standard deviations. density: [BINS] over -REACH..REACH, integrating to 1; kurtosis: 3 of
    a Gaussian; largest: the value of largest size."""

    density: tuple[float, ...]
    kurtosis: float
    largest: float


@dataclass(frozen=True)
class Histogram:
    """after: None where the scheme has no transform. transforms: their names."""

    name: str
    transforms: tuple[str, ...]
    before: Shape
    after: Shape | None


def bin_centers() -> list[float]:
    width = 2 * REACH / BINS
    return [-REACH + width * (i + 0.5) for i in range(BINS)]


def shape_of(weight: Tensor) -> Shape:
    """weight: floating point of any shape, at least two different values. Moments in float64, a piece at a time."""
    flat = weight.reshape(-1)
    pieces = [piece.double() for piece in flat.split(_CHUNK)]
    mean = sum(float(p.sum()) for p in pieces) / flat.numel()
    variance = sum(float((p - mean).square().sum()) for p in pieces) / flat.numel()
    if not variance > 0:
        raise FormatError(f"a weight whose {flat.numel()} values are all {mean:g} has no histogram")
    deviation = variance**0.5
    fourth = sum(float(((p - mean) / deviation).pow(4).sum()) for p in pieces) / flat.numel()
    largest = max(float(((p - mean) / deviation).abs().max()) for p in pieces)
    counts = torch.zeros(BINS, dtype=torch.float64)
    for piece in pieces:
        inside = ((piece - mean) / deviation).clamp(-REACH, REACH)
        counts += torch.histc(inside, BINS, -REACH, REACH)
    density = counts / (flat.numel() * 2 * REACH / BINS)
    return Shape(tuple(density.tolist()), fourth, largest)


def histograms(checkpoint: Path, original: str, names: Sequence[str], model: str | None) -> tuple[Histogram, ...]:
    """Of the named quantized parameters, read from the original one at a time (of a stack of experts, the first).

    model: the original's fingerprint as the checkpoint's report has it, None where it has none. FormatError where
    `original` is another model.
    """
    packed, source = open_native(checkpoint), open_source(original)
    if model is not None and source.fingerprint() != model:
        raise FormatError(
            f"--against {original}: not the model that {checkpoint} was made from (fingerprint "
            f"{source.fingerprint()[:12]}, not {model[:12]}); give that one"
        )
    skeleton = Skeleton(source)
    kinds = quantizable(skeleton.model)
    found = []
    for name in names:
        if name not in kinds or kinds[name].shape != packed.tensors[name].shape:
            raise FormatError(f"--against {original}: it has no weight {name} {list(packed.tensors[name].shape)}")
        with skeleton.loaded([name]) as values:
            weight = values[name].float()
        weight = weight.T.contiguous() if kinds[name].kind == "conv1d" else weight
        found.append(_histogram(packed, name, weight[0] if weight.ndim == 3 else weight))
    return tuple(found)


def _histogram(packed: NativeSource, name: str, weight: Tensor) -> Histogram:
    """weight: float32 [out_features, in_features], the original's."""
    stacked = len(packed.tensors[name].shape) == 3
    names = packed.quantization.scheme_of(name).transforms
    before, after = shape_of(weight), weight
    for transform in map(get_transform, names):
        fields = {f: packed.read_stored(stored_name(name, f)) for f in transform.fields((*weight.shape,))}
        after = transform.apply_weight(after, {f: t[0] if stacked else t for f, t in fields.items()})
    return Histogram(name, names, before, shape_of(after) if names else None)
