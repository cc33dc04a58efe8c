"""What is done to the input side of a weight before a codec sees it; the layer does the same to its input.

A transform T is an invertible map of the input space: y = W x = (W T^-1)(T x). The codec stores W T^-1, the layer
computes T x. A transform is a module of this folder with a `TRANSFORM`, found by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .registry import registered
from .scheme import Scheme, SchemeError
from .stats import Stats


class Transform(Protocol):
    name: str
    by_weight: bool
    """Whether `choose` looks at the weight's values; else layers that share an input share all of it."""

    def fields(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What the transform stores for a weight [out_features, in_features]."""

    def choose(self, w: Tensor, stats: Stats | None, seed: int, scheme: Scheme) -> dict[str, Tensor]:
        """The fields, chosen for w [out, in], which `scheme` will round. Depends on nothing but its arguments."""

    def apply_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """W T^-1, float32 [out, in]."""

    def undo_weight(self, w: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """The inverse of apply_weight."""

    def apply_input(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """T x over the last dimension, in the dtype of x."""

    def apply_stats(self, stats: Stats, fields: Mapping[str, Tensor]) -> Stats:
        """The statistics of T x."""


def derive(
    stats: Stats, names: tuple[str, ...], in_features: int, seed: int, scheme: Scheme
) -> tuple[dict[str, Tensor], Stats]:
    """(fields, statistics) of transforms that do not go by the weight. The last answer is kept with `stats`: layers
    that share an input share the rotated Hessian and its factor."""
    if stats.derived is None or stats.derived[0] != (names, seed):
        fields: dict[str, Tensor] = {}
        after, like = stats, stats.hessian.new_empty(0, in_features)
        for name in names:
            transform = get_transform(name)
            chosen = transform.choose(like, after, seed, scheme)
            after = transform.apply_stats(after, chosen)
            fields.update(chosen)
        stats.derived = ((names, seed), fields, after)
    return stats.derived[1], stats.derived[2]


def transform_names() -> list[str]:
    return list(registered("TRANSFORM"))


def get_transform(name: str) -> Transform:
    """The transform of that name, or SchemeError that lists those there are."""
    transforms = registered("TRANSFORM")
    if name not in transforms:
        raise SchemeError(f"unknown transform {name!r}; there are {list(transforms)}")
    return transforms[name]
