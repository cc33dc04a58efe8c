"""Kernel cpu_trellis: in which form it multiplies activations."""

from __future__ import annotations

import pytest
import torch

from bitpalette.kernels.activation_form import ACTIVATIONS_VARIABLE, activation_form
from bitpalette.kernels.base import KernelError
from bitpalette.kernels.cpu_trellis import CpuTrellisKernel
from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import available_isas
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import TrellisScheme, tile_count

SHAPE = (50, 700)


def weight() -> QuantizedTensor:
    g = torch.Generator().manual_seed(0)
    rows, tiles = tile_count(SHAPE)
    codes = torch.randint(0, 256, (rows * tiles * 64,), generator=g, dtype=torch.uint8)
    fields = {"codes": codes, "scale": (torch.rand(SHAPE[0], generator=g) + 0.1).half()}
    return QuantizedTensor(TrellisScheme(rate=2), SHAPE, fields)


def test_a_form_that_does_not_exist_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "int8"):
        monkeypatch.setenv(ACTIVATIONS_VARIABLE, value)
        assert activation_form() == "int8"
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "int16")
    with pytest.raises(KernelError, match=r"BITPALETTE_CPU_ACTIVATIONS=int16 .* use int8, exact or float32") as failure:
        activation_form()
    assert "\n" not in str(failure.value)


@pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")
@pytest.mark.parametrize(("form", "least", "most"), [("", 1e-3, 0.02), ("exact", 3e-6, 1e-4), ("float32", 0.0, 3e-7)])
def test_the_variable_decides_when_the_layer_is_made(
    monkeypatch: pytest.MonkeyPatch, form: str, least: float, most: float
) -> None:
    qt, kernel = weight(), CpuTrellisKernel()
    w = get_codec("trellis").decode(qt).double()
    packed = kernel.prepare(qt)
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, form)
    kernel.native(packed)
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "changed too late to matter")
    for tokens in (1, 5, 8):
        x = torch.randn(tokens, SHAPE[1], generator=torch.Generator().manual_seed(tokens))
        exact = x.double() @ w.T
        error = float((kernel.linear(x, packed, None).double() - exact).norm() / exact.norm())
        assert least <= error <= most
