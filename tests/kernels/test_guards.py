"""The guards of the GPU tests find what they are there for; on a CPU, with torch in place of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def guarded(guards: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(guards.__wrapped__.__globals__, "GPU", torch.device("cpu"))
    return guards


def beyond(tensor: Tensor, at: int) -> Tensor:
    """The byte that lies `at` bytes from the first of a tensor."""
    first = tensor.storage_offset() * tensor.element_size()
    return torch.zeros(0, dtype=torch.uint8).set_(tensor.untyped_storage(), first + at, (1,))


@pytest.mark.parametrize("at", [-1, -4096, 30, 30 + 4095])
def test_a_byte_beside_a_tensor(guarded: Any, at: int) -> None:
    tensors: list[Tensor] = []
    with guarded() as g:
        tensors.append(g.copy(torch.ones(3, 5, dtype=torch.float16)))
    beyond(tensors[0], at).zero_()
    with pytest.raises(AssertionError, match="tensor of 30 bytes"):
        g.check()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(3, 5, dtype=torch.float16, device="cpu"),
        lambda x: torch.empty((3, 5), dtype=torch.float16, device=torch.device("cpu")),
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(3, 5),
    ],
)
def test_what_a_kernel_allocates_is_guarded_and_nan(guarded: Any, allocate: Callable[[Tensor], Tensor]) -> None:
    before = torch.empty
    x = torch.zeros(3, 5, dtype=torch.float16)
    with guarded():
        y = allocate(x)
        assert y.shape == (3, 5) and y.dtype == torch.float16 and bool(y.isnan().all())
        y.fill_(1)
    assert torch.empty is before
    with pytest.raises(AssertionError, match="written behind a tensor of 30 bytes"), guarded():
        beyond(allocate(x), 30).zero_()


def test_a_counter_that_is_left(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpalette.kernels import native_cuda
    from bitpalette.kernels.native_cuda import Workspace

    counters = torch.zeros(8, dtype=torch.int32)
    space = Workspace(torch.zeros(8, dtype=torch.int32), counters)
    monkeypatch.setattr(native_cuda, "_of_stream", {(torch.device("cpu"), 0): space})
    with guarded():
        pass
    with pytest.raises(AssertionError, match="are not zero after"), guarded():
        counters[3] = 1
