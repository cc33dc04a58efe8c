from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def rng_weight() -> Callable[..., Tensor]:
    """rng_weight(*shape, seed=0): N(0, 1), float32, the same numbers every time."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make
