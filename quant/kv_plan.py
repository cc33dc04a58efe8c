"""The cache formats of a model's layers, and the means that its keys are centered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .kv_format import KVError, KVFormat


@dataclass(frozen=True, eq=False)
class KVPlan:
    """default: of every layer that attends to all tokens and is not in `layers`, by its index in the model.

    means: {layer: float32 [kv_heads, head_dim]}, the mean of the layer's keys (after rotary embedding) over calibration
    text; a layer without one is not centered. orders: {layer: int64 [kv_heads, head_dim]}, the channels of its keys in
    the order in which block floating point blocks them (`kv_bfp.channel_order`); a layer without one has them as the
    model has.
    """

    default: KVFormat = field(default_factory=KVFormat)
    layers: Mapping[int, KVFormat] = field(default_factory=dict)
    means: Mapping[int, Tensor] = field(default_factory=dict)
    orders: Mapping[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(plan: KVPlan | KVFormat | str) -> KVPlan:
        """A plan as it is, of one format, or of a format's name ("k4v4")."""
        if isinstance(plan, KVPlan):
            return plan
        return KVPlan(plan if isinstance(plan, KVFormat) else KVFormat.parse(plan))

    def format_of(self, layer: int) -> KVFormat:
        return self.layers.get(layer, self.default)

    def check(self, packed: list[int]) -> None:
        """KVError where the plan speaks of a layer that is not among `packed`, those that attend to all tokens."""
        if strange := sorted((set(self.layers) | set(self.means) | set(self.orders)) - set(packed)):
            raise KVError(f"the plan names layers {strange}, but only layers {packed} keep all tokens in this model")
