"""What a tensor is encoded as: a frozen, validated, JSON-serialisable value.

Every codec declares its own subclass with its own parameters (`quant/int.py` has `IntScheme`), so a new codec
is a new file. `Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 64})` finds the class by the codec's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class SchemeError(ValueError):
    """A scheme makes no sense, or does not fit a shape. The message names the value and what is allowed."""


@dataclass(frozen=True)
class Scheme:
    """Base of all schemes.

    transforms: what is done to the input side of the weight before the codec sees it, in order, by name
        (`quant/transform.py`), such as `("scale", "rotate")`; the layer applies the same to its input.
    """

    codec: ClassVar[str] = ""
    transforms: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        if self.transforms:
            from .transform import get_transform

            for name in self.transforms:
                get_transform(name)
            if len(set(self.transforms)) != len(self.transforms):
                raise SchemeError(f"transforms {list(self.transforms)} name one twice")
        self.validate()

    def validate(self) -> None:
        """Raise SchemeError where a parameter makes no sense on its own."""

    @property
    def block(self) -> int:
        """Columns that are coded together: 1, or 2 for pairs, 16 for tiles."""
        return 1

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise SchemeError where the scheme does not fit a weight of `shape` [out_features, in_features]."""
        if len(shape) != 2 or min(shape) < 1:
            raise SchemeError(f"{self}: a weight has two dimensions [out_features, in_features], got {list(shape)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; defaults are left out."""
        out: dict[str, Any] = {"codec": self.codec}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @staticmethod
    def from_dict(values: Mapping[str, Any] | Scheme) -> Scheme:
        """The scheme that `values` describe; a Scheme passes through. SchemeError names an unknown codec or key."""
        if isinstance(values, Scheme):
            return values
        from .codec import codec_names, get_codec

        if not isinstance(values, Mapping) or not isinstance(values.get("codec"), str):
            raise SchemeError(f'a scheme is a mapping with a "codec", one of {codec_names()}; got {values!r}')
        parameters = {k: v for k, v in values.items() if k != "codec"}
        cls = get_codec(values["codec"]).scheme_class
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise SchemeError(f"codec {cls.codec!r} has no parameter {unknown[0]!r}; it has {sorted(known)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()})
        except TypeError as error:
            raise SchemeError(f"codec {cls.codec!r}: {error}") from None

    def replace(self, **changes: Any) -> Scheme:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.to_dict().items() if k not in ("codec", "transforms")]
        return " ".join([self.codec, *parts, *(f"+{t}" for t in self.transforms)])


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """SchemeError unless `value` is an int (not a bool) in low..high."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        allowed = f"{low} to {high}" if high is not None else f"at least {low}"
        raise SchemeError(f"{name} is a whole number, {allowed}; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SchemeError(f"{name} is true or false; got {value!r}")
