"""How Triton products are launched, and how what was tuned is kept. Nothing here needs Triton or a GPU but one test."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from bitpalette.kernels import triton_tuning
from bitpalette.kernels.triton_format import TileFormat, pair_table
from bitpalette.kernels.triton_launch import Launch, Problem, candidates, default_launch, token_class
from bitpalette.kernels.triton_runtime import why_not_device

FORMATS = [
    TileFormat("int", "bits4", 128, 8),
    TileFormat("int", "bits2", 32, None),
    TileFormat("table", "pairs3", 64),
    TileFormat("trellis", "trellis", row_bits=40, window=16),
]
SHAPES = [(64, 64), (1000, 129), (4096, 4096), (128256, 4096), (4096, 14336)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_launches_suit_the_kernel(form: TileFormat) -> None:
    for shape, tokens, operation in itertools.product(SHAPES, (1, 17, 64, 300, 9000), ("w16", "w8")):
        problem = Problem(operation, form, "float16", shape, token_class(tokens))
        launches = candidates(problem, 132)
        assert launches[0] == default_launch(problem, 132) and len(launches) == len(set(launches)) <= 13
        for launch in launches:
            # a product of 16 columns of words or more; a warp has 16 rows of each half
            assert launch.block_k // 64 * form.word_columns >= 16
            assert launch.block_n % 64 == 0 and launch.warps * 32 <= max(128, launch.block_n)
            assert launch.block_m & (launch.block_m - 1) == 0 and 16 <= launch.block_m <= 64
            steps = -(-shape[1] // 64) * 64 // launch.block_k
            assert launch.parts == 1 or launch.parts * 2 <= steps


def test_small_products_fill_the_gpu() -> None:
    problem = Problem("w16", FORMATS[0], "float16", (4096, 4096), token_class(1))
    launch = default_launch(problem, 132)
    blocks, tokens, parts = launch.grid(4096, 1)
    assert blocks * tokens * parts >= 132


def test_token_classes() -> None:
    assert [token_class(m) for m in (1, 16, 17, 64, 65, 4096, 100000)] == [16, 16, 32, 64, 128, 4096, 4096]


def test_keys_tell_problems_apart() -> None:
    problems = [Problem("w16", form, "float16", shape, 16) for form in FORMATS for shape in SHAPES]
    problems.append(Problem("w8", FORMATS[0], "float16", SHAPES[0], 16))
    problems.append(Problem("w16", FORMATS[0], "bfloat16", SHAPES[0], 16))
    problems.append(Problem("w16", TileFormat("trellis", "trellis", row_bits=40, window=12), "float16", SHAPES[0], 16))
    problems.append(Problem("w16", TileFormat("int", "bits4", 128, None), "float16", SHAPES[0], 16))
    assert len({problem.key() for problem in problems}) == len(problems)


def test_tuned_launches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPALETTE_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    path = triton_tuning.cache_file("NVIDIA H100 80GB HBM3")
    assert path.parent == tmp_path / "cache" and path.name.startswith("triton-nvidia-h100-80gb-hbm3-")
    assert triton_tuning._stored(path) == {}
    first, second = Launch(64, 16, 64, 4, 4, 3), Launch(128, 64, 128, 1, 4, 2)
    triton_tuning._store(path, "a", first)
    triton_tuning._store(path, "b", second)
    assert triton_tuning._stored(path) == {"a": first, "b": second}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for broken in ("{", "[]", json.dumps({"a": {"block_n": 1}}), json.dumps({"a": 3})):
        path.write_text(broken)
        assert triton_tuning._stored(path) == {}


def test_pairs() -> None:
    table = torch.randn(16).half()
    pairs = pair_table(table).view(torch.float16).view(256, 2)
    index = torch.arange(256)
    assert torch.equal(pairs[:, 0], table[index & 15]) and torch.equal(pairs[:, 1], table[index >> 4])


def test_no_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not_device(torch.device("cpu")) == "runs on a GPU, not on cpu"
