"""Quantized modules under accelerate: dispatch and offloading, with and without buffers, before and after a forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.int import IntScheme
from bitpalette.quant.solver import quantize_tensor

accelerate = pytest.importorskip("accelerate")


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        scheme = IntScheme(bits=4, group_size=32, symmetric=False)
        table = quantize_tensor(torch.randn(48, 64), scheme)
        self.embed = QuantEmbedding.from_tensor(table)
        self.up = QuantLinear.from_tensor(quantize_tensor(torch.randn(80, 64), scheme), torch.randn(80))
        self.norm = nn.LayerNorm(80)
        self.down = QuantLinear.from_tensor(quantize_tensor(torch.randn(64, 80), IntScheme(bits=3)))
        self.head = QuantLinear.from_tensor(table)
        if tied:
            self.head.tie(self.embed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


IDS = torch.tensor([[1, 2, 47]])


def close(y: Tensor, reference: Tensor) -> bool:
    return bool((y - reference).norm() <= 0.05 * reference.norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk", "dispatch"])
def test_offloading(tied: bool, ran_before: bool, buffers: bool, where: str, tmp_path: Path) -> None:
    model = Model(tied)
    with torch.no_grad():
        expected = Model(tied)(IDS)
        if ran_before:
            model(IDS)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
        elif where == "disk":
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu", offload_buffers=buffers)
        else:
            names = ["embed", "up", "norm", "down", "head"]
            device_map = dict.fromkeys(names, "cpu") | {"up": "disk", "down": "disk"}
            accelerate.dispatch_model(
                model,
                device_map,
                main_device="cpu",
                offload_dir=str(tmp_path),
                offload_buffers=buffers,
                force_hooks=True,
            )
        for _ in range(2):
            assert close(model(IDS), expected)
        if buffers and not ran_before and where != "dispatch":
            assert all(b.is_meta for b in model.buffers()), "offloaded weights stayed in memory"


def test_hooks_can_be_removed() -> None:
    model = Model(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with torch.no_grad():
        y = model(IDS)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert close(model(IDS), y)
