"""Memory of a plan: its parts against the tensors of packed models and caches."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kv_models import llama

import bitpalette.plan_base as plan_base
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.structure import quantizable
from bitpalette.kernel_bench.random_weight import random_weight
from bitpalette.kernels.base import choose
from bitpalette.kernels.kv_rows import KVRows
from bitpalette.kv_cache import QuantizedCache
from bitpalette.mapped_pages import drop_read_pages
from bitpalette.plan_memory import COMMON, Memory, kept_bytes, kv_bytes, longest_context, memory_of
from bitpalette.quant.kv_format import KVFormat
from bitpalette.quant.kv_plan import KVPlan
from bitpalette.quant.scheme import Scheme

INT4 = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 32, "transforms": ["rotate"]})
INT8 = Scheme.from_dict({"codec": "int", "bits": 8})
SCHEMES = [
    {"codec": "int", "bits": 3, "group_size": 32},
    {"codec": "int", "bits": 4, "group_size": 0, "symmetric": False},
    {"codec": "int", "bits": 8},
    {"codec": "lut", "entries": 8, "group_size": 32},
    {"codec": "lut", "entries": 16, "table": "kmeans", "table_scope": "row"},
    {"codec": "trellis", "rate": 2.5},
]
BASE = 100_000_000


@pytest.mark.parametrize("values", SCHEMES, ids=lambda v: v["codec"] + str(v.get("bits", "")))
@pytest.mark.parametrize("shape", [(1, 64), (17, 123), (48, 96), (123, 1537)])
def test_kept_bytes_are_those_of_the_kernel(values: dict[str, Any], shape: tuple[int, int]) -> None:
    scheme = Scheme.from_dict(values)
    kernel = choose(scheme, shape, torch.device("cpu"))
    packed = kernel.prepare(random_weight(scheme, shape, torch.Generator().manual_seed(0)))
    assert kept_bytes(scheme, shape) == packed.nbytes


def test_stacks_and_16_bits() -> None:
    assert kept_bytes(None, (5, 7)) == 70
    assert kept_bytes(None, (5, 7), torch.float32) == 140
    assert kept_bytes(INT8, (3, 16, 32)) == 3 * kept_bytes(INT8, (16, 32))


def packed_model() -> tuple[Any, dict[str, Scheme | None]]:
    from bitpalette.hf import replace_modules

    model = llama()
    weights = quantizable(model)
    schemes: dict[str, Scheme | None] = {
        name: INT8 if w.head or w.embedding else INT4 if "o_proj" not in name else None for name, w in weights.items()
    }
    generator = torch.Generator().manual_seed(0)
    packed = {k: random_weight(s, weights[k].shape, generator) for k, s in schemes.items() if s is not None}
    return replace_modules(model, packed), schemes


def test_weights_are_the_tensors_of_the_packed_model() -> None:
    with torch.device("meta"):
        skeleton = llama_on_meta()
    model, schemes = packed_model()
    memory = memory_of(skeleton, schemes, None, 16, dtype=torch.float32, base=BASE)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    frequencies = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "inv_freq" in n)
    assert memory.weights == sum(held.values()) - frequencies
    assert memory.head == kept_bytes(INT8, (211, 64))
    assert memory.total == BASE + memory.weights + memory.cache + memory.workspace


def llama_on_meta() -> Any:
    import transformers
    from kv_models import SIZES

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=2))


@pytest.mark.parametrize("tokens", [1, 70, 300])
def test_a_packed_cache_is_what_it_allocates(tokens: int) -> None:
    model, plan = llama(), KVPlan.of("k4v2")
    cache: Any = QuantizedCache(model.config, plan, tokens)
    for layer in cache.layers:
        k = torch.randn(2, 2, tokens, 16)
        layer.put(k, k, np.zeros(2, np.int64))
        assert isinstance(layer.rows, KVRows)
    assert kv_bytes(model, plan, tokens, 2, torch.float32) == cache.nbytes


def test_a_dense_cache_and_windows() -> None:
    model = llama()
    assert kv_bytes(model, None, 100, 3, torch.bfloat16) == 2 * 3 * 100 * 2 * 2 * 16 * 2
    text = model.config
    text.layer_types, text.sliding_window = ["sliding_attention", "full_attention"], 9
    assert kv_bytes(model, None, 100, 1, torch.bfloat16) == (100 + 9) * 2 * 2 * 16 * 2


def test_layers_of_a_plan_have_their_own_formats() -> None:
    model = llama()
    mixed = KVPlan(KVFormat.parse("k4v4"), {1: KVFormat.parse("k8v8")})
    of = {name: kv_bytes(model, KVPlan.of(name), 500, 1, torch.bfloat16) for name in ("k4v4", "k8v8")}
    assert kv_bytes(model, mixed, 500, 1, torch.bfloat16) == (of["k4v4"] + of["k8v8"]) // 2


def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    model = llama()
    whole = memory_of(model, {}, None, 200, base=BASE)
    found = longest_context(model, {}, None, [whole.total, whole.total - 1, BASE, 10 * BASE], base=BASE)
    assert found == {whole.total: 200, whole.total - 1: 199, BASE: 0, 10 * BASE: 512}
    assert set(longest_context(model, {}, KVPlan.of("k4v4"), base=BASE)) == set(COMMON)


def test_a_prompt_in_pieces_takes_less() -> None:
    model = llama()
    whole, pieces = (memory_of(model, {}, None, 300, base=BASE, chunk=chunk) for chunk in (None, 64))
    assert pieces.workspace < whole.workspace
    assert pieces.cache == whole.cache


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda"}, "no GPU here"),
        ({"context": 0}, "--context 0"),
        ({"batch": 0}, "--batch 0"),
        ({"schemes": {"nothing.weight": INT8}}, "nothing.weight is no weight"),
    ],
)
def test_refusals_are_one_line(change: dict[str, Any], words: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PlanError) as caught:
        memory_of(llama(), **({"schemes": {}, "kv": None, "context": 8, "base": BASE} | change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_base_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def measured() -> Any:
        calls.append(1)
        file = plan_base._File(
            bitpalette_version=plan_base.__version__, processor=plan_base.processor(), dense=5, packed=7
        )
        return file

    monkeypatch.setenv("BITPALETTE_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_base, "_measured", measured)
    assert [plan_base.base_bytes(True), plan_base.base_bytes(False), plan_base.base_bytes(True)] == [7, 5, 7]
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert plan_base.base_bytes(True) == 7
    assert len(calls) == 2
    assert isinstance(Memory(1, 1, 1, 1, 1, 1, 1).total, int)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    for written in (False, True):
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert sum(mapped[::4096]) == 0  # read, so resident
        if written:
            mapped[5] = 77
        dropped = drop_read_pages([path])
        assert dropped == 0 if written else dropped >= 1 << 20
        assert mapped[:7] == bytes([0, 1, 2, 3, 4, 77 if written else 5, 6])
        mapped.close()
