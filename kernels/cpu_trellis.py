"""Codec `trellis` on a CPU, natively from the canonical layout (csrc/cpu/trellis_linear.h)."""

from __future__ import annotations

from typing import Any

import torch

from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.trellis import TrellisScheme
from .activation_form import EXACT, FLOAT32, INT8, activation_form
from .base import Packed
from .native_linear import NativeLinear

INPUT_FORMS = {FLOAT32: 0, INT8: 2, EXACT: 3}
"""Numbers of `InputForm` in csrc/cpu/activations.h; a scale for 256 columns is enough for rotated inputs."""


class CpuTrellisKernel(NativeLinear):
    name = "cpu_trellis"
    rank = 120
    canonical = True

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, TrellisScheme):
            return f"runs codec trellis, not {scheme.codec}"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        return Packed(qt.scheme, (qt.shape[0], qt.shape[1]), {name: qt.fields[name] for name in ("codes", "scale")})

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return QuantizedTensor(packed.scheme, packed.shape, dict(packed.tensors))

    def make_native(self, packed: Packed) -> Any:
        scheme = packed.scheme
        if not isinstance(scheme, TrellisScheme):
            raise TypeError(f"cpu_trellis runs codec trellis, not {scheme}")
        addresses = (packed.tensors["codes"].data_ptr(), packed.tensors["scale"].data_ptr())
        form = INPUT_FORMS[activation_form()]
        return cpu_module().trellis_weight(
            self.resolve_isa(), form, *addresses, *packed.shape, scheme.row_bits, scheme.window
        )


KERNEL = CpuTrellisKernel()
