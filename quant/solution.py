"""What a solver gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Solution:
    """fields: the codec's. notes: what is worth telling about the rounding, such as {"feedback_share": .61}."""

    fields: dict[str, Tensor]
    notes: dict[str, float] = field(default_factory=dict)
