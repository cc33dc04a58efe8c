"""In which form native CPU kernels multiply activations: what BITPALETTE_CPU_ACTIVATIONS says."""

from __future__ import annotations

import os

from .base import KernelError

ACTIVATIONS_VARIABLE = "BITPALETTE_CPU_ACTIVATIONS"

INT8, EXACT, FLOAT32 = "int8", "exact", "float32"


def activation_form() -> str:
    """int8, exact (two planes of int8, close to float32) or float32; int8 where the variable is unset or empty.

    Asked once a layer, when its native weight is made. KernelError for any other value.
    """
    value = os.environ.get(ACTIVATIONS_VARIABLE) or INT8
    if value not in (INT8, EXACT, FLOAT32):
        raise KernelError(f"{ACTIVATIONS_VARIABLE}={value} is no form of activations; use {INT8}, {EXACT} or {FLOAT32}")
    return value
