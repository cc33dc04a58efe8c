"""In which form native CPU kernels multiply activations: what BITPALETTE_CPU_ACTIVATIONS says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .base import KernelError

ACTIVATIONS_VARIABLE = "BITPALETTE_CPU_ACTIVATIONS"

INT8, EXACT, FLOAT32 = "int8", "exact", "float32"
FORMS = (INT8, EXACT, FLOAT32)


def activation_form() -> str:
    """int8, exact (two planes of int8, close to float32) or float32; int8 where the variable is unset or empty.

    Asked once a layer, when its native weight is made. KernelError for any other value.
    """
    value = os.environ.get(ACTIVATIONS_VARIABLE) or INT8
    if value not in FORMS:
        raise KernelError(f"{ACTIVATIONS_VARIABLE}={value} is no form of activations; use {INT8}, {EXACT} or {FLOAT32}")
    return value


@contextmanager
def layers_made_with(form: str) -> Iterator[None]:
    """Layers that are first called in this block, by any thread, multiply activations in that form from then on."""
    before = os.environ.get(ACTIVATIONS_VARIABLE)
    os.environ[ACTIVATIONS_VARIABLE] = form
    try:
        yield
    finally:
        if before is None:
            del os.environ[ACTIVATIONS_VARIABLE]
        else:
            os.environ[ACTIVATIONS_VARIABLE] = before
