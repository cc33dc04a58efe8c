"""kv_attention on the host executor, all of its kernels, against float64 on the decoded values."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent


def _cases() -> ModuleType:
    path = HERE / "kv_case.py"
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


kv = _cases()
Shape = kv.Shape
BITS = (2, 3, 4, 8)
TOLERANCE = 1e-3
"""Queries and weights are rounded to fp16: 5e-4 of a score each at most."""


@pytest.fixture(scope="module")
def library(hostexec: Any) -> Any:
    return hostexec.build(kv.SOURCES)


def check(hostexec: Any, library: Any, shape: Any, options: Any = None, tolerance: float = TOLERANCE) -> torch.Tensor:
    cache = kv.Cache(shape)
    out = cache.run(hostexec, library, options)
    error = kv.error(out, cache.want())
    assert (error <= tolerance).all(), f"{error.max():.1e}, {shape}"
    return out


@pytest.mark.parametrize("bits", list(itertools.product(BITS, BITS)), ids=lambda b: f"k{b[0]}v{b[1]}")
def test_every_pair_of_bits(hostexec: Any, library: Any, bits: tuple[int, int]) -> None:
    for head_dim, group, tokens in ((64, 3, 1), (64, 4, 4), (128, 8, 1), (128, 1, 16), (80, 4, 1), (256, 2, 1)):
        check(hostexec, library, Shape(*bits, head_dim=head_dim, group=group, tokens=tokens, kv_heads=1))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_lengths_and_splits(hostexec: Any, library: Any, length: int) -> None:
    """Rows of a batch with other lengths beside it; splits that have nothing to do."""
    for splits, dense_splits, tokens in ((2, 1, 1), (9, 2, 4)):
        shape = Shape(lengths=(length, 130, 1), splits=splits, dense_splits=dense_splits, tokens=tokens)
        check(hostexec, library, shape)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_tokens_and_types(hostexec: Any, library: Any, group: int, tokens: int, dtype: torch.dtype) -> None:
    """Up to 32 rows of queries: four blocks of 8, or two of 16. 16 bits in, 16 bits out."""
    shape = Shape(group=group, tokens=tokens, dtype=dtype, q_dtype=dtype, out_dtype=dtype, head_dim=128)
    check(hostexec, library, shape, tolerance=8e-3 if dtype == torch.bfloat16 else TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"sliding_window": 40},
        {"sliding_window": 7, "tokens": 4},
        {"sliding_window": 90, "tokens": 16, "group": 1},
        {"sink_logits": True},
        {"start": (70, 0)},
        {"start": (204, 12), "tokens": 4},
        {"fresh": False},
        {"sinks": 0, "window": 0, "fresh": False},
        {"window": 150, "dense_splits": 2},
        {"rotated": False},
        {"rotated": False, "head_dim": 96},
        {"head_dim": 192, "head_dim_v": 128},
        {"head_dim": 64, "head_dim_v": 128, "bits_k": 3},
        {"head_dim": 80, "bits_k": 3, "bits_v": 3},
        {"head_dim": 16, "head_dim_v": 48, "bits_k": 3, "bits_v": 2},
    ],
    ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()),
)
def test_what_models_ask_for(hostexec: Any, library: Any, options: dict[str, Any]) -> None:
    check(hostexec, library, Shape(lengths=(200, 65), **options))


def test_results_do_not_depend_on_the_order_of_threads(hostexec: Any, library: Any) -> None:
    for shape in (Shape(bits_v=3, lengths=(600,), head_dim=128), Shape(bits_k=8, bits_v=2, head_dim=80, tokens=4)):
        outs = [check(hostexec, library, shape, options) for options in hostexec.all_options()]
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_nan_reaches_who_sees_it_and_nobody_else(hostexec: Any, library: Any) -> None:
    cache = kv.Cache(Shape(tokens=2, sliding_window=50, lengths=(200,), kv_heads=1))
    page, slot = int(cache.table[0, 1]), 10  # position 4 + 74, seen by nobody
    for gain in (cache.k_gain, cache.v_gain):
        gain[page, 0, slot] = math.nan
    out = cache.run(hostexec, library)
    assert (kv.error(out, cache.want()) <= TOLERANCE).all()
    for side in ("k_gain", "v_gain"):
        cache = kv.Cache(Shape(tokens=2, sliding_window=50, lengths=(200,), kv_heads=1))
        # 216 positions: the first query, at 214, sees 165 on; the second, at 215, 166 on
        getattr(cache, side)[int(cache.table[0, 161 // 64]), 0, 161 % 64] = math.nan
        out = cache.run(hostexec, library)
        assert out[:, :, 0].isnan().all() and out[:, :, 1].isfinite().all()
    cache = kv.Cache(Shape(kv_heads=2, group=2))
    cache.q[0, 1, 0, 3] = math.inf
    out = cache.run(hostexec, library)
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3]].isfinite().all()


def test_padding_is_zero(hostexec: Any, library: Any) -> None:
    """Rows with fewer tokens than queries: the first queries are padding."""
    cache = kv.Cache(Shape(tokens=4, lengths=(0,), sinks=0, window=2, fresh=False))
    cache.window[2][:] = 2
    out = cache.run(hostexec, library)
    assert (out[:, :, :2] == 0).all() and (kv.error(out, cache.want()) <= TOLERANCE).all()


def test_a_wrong_call_is_refused_with_its_numbers(hostexec: Any, library: Any) -> None:
    def refusal(shape: Any) -> str:
        with pytest.raises(RuntimeError, match="returned -1"):
            kv.Cache(shape).run(hostexec, library)
        text = hostexec.guarded(torch.zeros(512, dtype=torch.uint8))
        library.call("refused", text, 512)
        return bytes(text.array).rstrip(b"\0").decode()

    assert "17 new tokens; 1 to 16" in refusal(Shape(tokens=17))
    assert "head_dim of 72" in refusal(Shape(head_dim=72))
    assert "1 splits, 1 of them dense, and 4 pages" in refusal(Shape(splits=1))


@pytest.mark.parametrize(("bits", "head_dim"), [((4, 4), 128), ((2, 2), 128), ((8, 8), 128), ((4, 4), 64)])
def test_pages_are_read_without_bank_conflicts(
    hostexec: Any, library: Any, bits: tuple[int, int], head_dim: int
) -> None:
    check(hostexec, library, Shape(*bits, head_dim=head_dim), hostexec.Options(conflicts=True))
    counted = {key: extra for key, (_, extra) in library.conflicts().items() if key[0].endswith("kv_pages.cuh")}
    assert counted and all(extra == 0 for extra in counted.values()), counted
