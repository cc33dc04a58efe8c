"""Hidden states block by block against the whole model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpalette.calibrate import stream as streaming
from bitpalette.calibrate.collect_stats import head_module
from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.calibrate.whole import load_model
from bitpalette.formats.base import open_source


def block_inputs(model: Any, names: list[str], tokens: Tensor) -> list[Tensor]:
    """The hidden states that each module is called with."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_tokens", [24 * 2, 2048], ids=["three batches", "one batch"])
def test_every_family(
    checkpoint: Callable[..., Path], family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCH_TOKENS", batch_tokens)
    source = open_source(checkpoint(family))
    tokens = torch.randint(4, 203, (5, 24), generator=torch.Generator().manual_seed(1))
    whole, skeleton = load_model(source, torch.float32), Skeleton(source)
    head = head_module(skeleton.model)
    want = block_inputs(whole, [name for name, _ in skeleton.blocks] + [head], tokens)
    stream = streaming.start(skeleton, tokens, torch.float32)
    assert [h.shape[0] for h in stream.hidden] == ([2, 2, 1] if batch_tokens == 48 else [5])
    assert all(p.is_meta for p in skeleton.model.parameters())
    for index in range(len(skeleton.blocks)):
        assert_close(torch.cat(stream.hidden), want[index])
        names = skeleton.parameters_of(index)
        with skeleton.loaded(names), torch.no_grad():
            before = [h.clone() for h in stream.hidden]
            stream.run(skeleton.blocks[index][1], index, keep=False)
            assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))
            stream.run(skeleton.blocks[index][1], index, keep=True)
    inputs = list(streaming.head_inputs(skeleton, tokens, stream, head, torch.float32))
    assert_close(torch.cat(inputs), want[-1])
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert [m for _, m in skeleton.blocks] == [skeleton.model.get_submodule(n) for n, _ in skeleton.blocks]


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def test_dtype_of_hidden_states(checkpoint: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_source(checkpoint("llama")))
    stream = streaming.start(skeleton, torch.full((1, 8), 5), torch.bfloat16)
    assert {h.dtype for h in stream.hidden} == {torch.bfloat16}
    names = skeleton.parameters_of(0)
    with skeleton.loaded(names), torch.no_grad():
        skeleton.cast(names, torch.bfloat16)
        stream.run(skeleton.blocks[0][1], 0, keep=True)
    assert {h.dtype for h in stream.hidden} == {torch.bfloat16}


def test_arguments_that_depend_on_the_tokens(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one batch are not given to another; masks and positions are kept once."""
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 48)
    skeleton = Skeleton(open_source(checkpoint("llama")))
    tokens = torch.randint(4, 203, (4, 24), generator=torch.Generator().manual_seed(1))
    plain = streaming.start(skeleton, tokens, torch.float32)
    assert plain.calls[0] is plain.calls[1]
    forward = skeleton.model.model.forward
    skeleton.model.model.forward = lambda input_ids, **kwargs: forward(
        input_ids=input_ids, extra=input_ids + 0, **kwargs
    )
    stream = streaming.start(skeleton, tokens, torch.float32)
    for batch, calls in zip(tokens.split(2), stream.calls, strict=True):
        for _, kwargs in calls:
            assert torch.equal(kwargs["extra"], batch)


def test_no_cache_is_kept(checkpoint: Callable[..., Path], family: str) -> None:
    """One would grow with every run of a block, and later tokens would see those of earlier batches."""
    from transformers.cache_utils import Cache

    skeleton = Skeleton(open_source(checkpoint(family)))
    stream = streaming.start(skeleton, torch.full((1, 8), 5), torch.float32)
    for args, kwargs in stream.calls[0]:
        assert not any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
