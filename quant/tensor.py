"""A quantized weight: scheme, shape and named fields in canonical layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .scheme import Scheme, SchemeError


@dataclass
class QuantizedTensor:
    """A weight [out_features, in_features], or a stack of them [experts, out_features, in_features].

    fields: {name: Tensor} as `field_specs(scheme, shape)` declares. A stack's "codes" are the experts' codes one
    after another (flat uint8); every other field has a leading dimension of experts. notes: what the solver told of its
    work; not stored.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    fields: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.shape = tuple(int(n) for n in self.shape)
        for name, (shape, dtype) in field_specs(self.scheme, self.shape).items():
            have = self.fields.get(name)
            if have is None:
                raise SchemeError(f"{self.scheme}: field {name!r} is missing")
            if tuple(have.shape) != shape or have.dtype != dtype:
                raise SchemeError(
                    f"{self.scheme} of shape {list(self.shape)}: field {name!r} is {have.dtype} {list(have.shape)}, "
                    f"not {dtype} {list(shape)}"
                )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its own basis, transforms undone, of `self.shape`. Computed in float32."""
        from .codec import get_codec
        from .transform import get_transform

        if len(self.shape) == 3:
            return torch.stack([part.dequantize(dtype) for part in unstack(self)])
        w = get_codec(self.scheme.codec).decode(self)
        for name in reversed(self.scheme.transforms):
            w = get_transform(name).undo_weight(w, self.fields)
        return w.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields: codes, scales, zero points, tables, signs."""
        return sum(t.numel() * t.element_size() for t in self.fields.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, everything counted, divided by the number of weights."""
        return 8 * self.nbytes / _count(self.shape)

    def to(self, device: Any) -> QuantizedTensor:
        return QuantizedTensor(self.scheme, self.shape, {k: v.to(device) for k, v in self.fields.items()})


def field_specs(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{field: (shape, dtype)} of a weight of `shape`, from the scheme and the shape alone. SchemeError if misfit."""
    from .codec import get_codec
    from .transform import get_transform

    if len(shape) == 3:
        experts, rest = shape[0], field_specs(scheme, shape[1:])
        return {
            name: ((experts * s[0],) if name == "codes" else (experts, *s), dtype) for name, (s, dtype) in rest.items()
        }
    scheme.check_shape(shape)
    matrix = (shape[0], shape[1])
    specs = dict(get_codec(scheme.codec).fields(scheme, matrix))
    for name in scheme.transforms:
        specs.update(get_transform(name).fields(matrix))
    return specs


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes a weight of `shape` takes on disk, everything counted."""
    return sum(_count(s) * dtype.itemsize for s, dtype in field_specs(scheme, shape).values())


def stack(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One QuantizedTensor [experts, out, in] from those of the experts, all of one scheme and shape."""
    first = parts[0]
    for part in parts:
        if part.scheme != first.scheme or part.shape != first.shape:
            raise SchemeError(f"cannot stack {part.scheme} {part.shape} with {first.scheme} {first.shape}")
    join = {name: torch.cat if name == "codes" else torch.stack for name in first.fields}
    fields = {name: join[name]([part.fields[name] for part in parts]) for name in first.fields}
    return QuantizedTensor(first.scheme, (len(parts), *first.shape), fields)


def unstack(qt: QuantizedTensor) -> list[QuantizedTensor]:
    """The inverse of `stack`; the parts are views."""
    experts = qt.shape[0]
    split = {name: t.view(experts, -1) if name == "codes" else t for name, t in qt.fields.items()}
    return [QuantizedTensor(qt.scheme, qt.shape[1:], {k: t[e] for k, t in split.items()}) for e in range(experts)]


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
