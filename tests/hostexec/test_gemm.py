"""The GEMMs on the host executor: every format, activation and shape, ragged edges, any split, against float64."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels.tiles import pack_tiles
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent
FORMATS = ["int2", "int3", "int4", "int8", "progressive", "lut2", "lut3", "lut4", "e4m3", "trellis"]
ACTIVATIONS = {"Half": torch.float16, "BFloat": torch.bfloat16}
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the result's norm: its rounding, and that of levels in bf16."""

# format -> (fragment, schemes)
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{
        f"int{bits}": (
            f"IntFragment<{{act}}, {bits}>",
            [
                {"codec": "int", "bits": bits, "group_size": 32, "symmetric": False},
                {"codec": "int", "bits": bits, "group_size": 64},
                {"codec": "int", "bits": bits, "group_size": 128, "symmetric": False},
                {"codec": "int", "bits": bits},
                {"codec": "int", "bits": bits, "symmetric": False},
            ],
        )
        for bits in (2, 3, 4, 8)
    },
    "lut2": ("LutFragment<{act}, 2>", [{"codec": "lut", "entries": 4, "group_size": 32}]),
    "lut3": (
        "LutFragment<{act}, 3>",
        [{"codec": "lut", "entries": 8, "group_size": 64}, {"codec": "lut", "entries": 6, "table": "kmeans"}],
    ),
    "lut4": (
        "PairFragment<{act}>",
        [
            {"codec": "lut", "group_size": 128},
            {"codec": "lut", "entries": 11, "table": "kmeans"},
            {"codec": "float", "element": "e2m1", "group_size": 32},
        ],
    ),
    "e4m3": ("E4M3Fragment<{act}>", [{"codec": "float", "element": "e4m3", "group_size": 64}]),
    "trellis": (
        "TrellisFragment<{act}>",
        [
            {"codec": "trellis", "rate": m / 16, "window": w}
            for m, w in [(16, 12), (33, 12), (40, 14), (48, 16), (80, 12)]
        ],
    ),
}
SHAPES = [(64, 64), (1, 128), (200, 328), (130, 648), (80, 272)]
TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256]


def random_weight(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    torch.manual_seed(zlib.crc32(f"{scheme} {shape}".encode()))
    if not isinstance(scheme, IntScheme):
        return quantize_tensor(torch.randn(shape), scheme)
    qt = quantize_tensor(torch.zeros(shape), scheme)
    codes = torch.randint(0, 1 << scheme.bits, shape, dtype=torch.uint8)
    fields = {**qt.fields, "codes": pack_bits(codes, scheme.bits).flatten()}
    fields["scale"] = (torch.randn(qt.fields["scale"].shape) * 0.1).half()
    if not scheme.symmetric:
        zero = torch.randint(0, 1 << scheme.bits, qt.fields["scale"].shape, dtype=torch.uint8)
        fields["zero_point"] = pack_bits(zero, scheme.bits)
    return QuantizedTensor(scheme, shape, fields)


def decoded(qt: QuantizedTensor) -> Tensor:
    return get_codec(qt.scheme.codec).decode(qt).double()


class Run:
    """One weight on one built format."""

    def __init__(self, hostexec: Any, library: Any, name: str, qt: QuantizedTensor, bias: Tensor | None) -> None:
        self.hostexec, self.library, self.qt = hostexec, library, qt
        self.format = FORMATS.index(name)
        tensors = pack_tiles(qt)
        names = ["codes", "scale", "zero_point", "group_scale", "group_offset", "table"]
        self.weight = [hostexec.guarded(tensors[n]) if n in tensors else None for n in names]
        self.has_second = "zero_point" in tensors or "group_offset" in tensors
        self.bias = None if bias is None else hostexec.guarded(bias)

    def __call__(
        self,
        x: Tensor,
        dtype: torch.dtype,
        *,
        scale: Tensor | None = None,
        total: Tensor | None = None,
        plan_tokens: int = 0,
        invariant: bool = False,
        shares: int = 3,
        shared_limit: int = 0,
        options: Any = None,
    ) -> Tensor:
        """y [tokens, n] for x [tokens, bytes of a row]."""
        guarded, (n, k), tokens = self.hostexec.guarded, self.qt.shape, len(x)
        scheme = self.qt.scheme
        numbers = [n, k, *(getattr(scheme, name, 0) for name in ("group_size", "row_bits", "window")), self.format]
        row = x.shape[1] * x.element_size()
        split = [tokens, plan_tokens or tokens, int(invariant), shares, shared_limit, row, row, n]
        sizes, plan = guarded(np.array([*numbers, *split], np.int64)), guarded(np.zeros(6, np.int64))
        self.library.call("gemm_plan", sizes, int(self.has_second), plan)
        parts, counters = (int(words) for words in plan.array[:2])
        y = guarded(torch.full((tokens, n), torch.nan, dtype=dtype))
        arrived = guarded(np.zeros(counters, np.uint32))
        inputs = [guarded(x), *(None if t is None else guarded(t) for t in (scale, total))]
        work = guarded(np.full(max(parts, 1), np.nan, np.float32))
        self.library.call("gemm_run", sizes, *self.weight, self.bias, *inputs, y, work, arrived, options=options)
        assert not arrived.array.any()
        return y.tensor.clone()


def agree(y: Tensor, want: Tensor, tolerance: float) -> None:
    assert float((y.double() - want).norm()) <= tolerance * float(want.norm()) + 1e-12


def build(hostexec: Any, name: str, act: str) -> Any:
    return hostexec.build([HERE / "gemm_entry.cpp"], defines=[f"GEMM_FORMAT=W4A16<{CASES[name][0].format(act=act)}>"])


def test_the_numbers_of_the_formats() -> None:
    text = (HERE.parents[1] / "csrc" / "cuda" / "container.cuh").read_text()
    body = text.split("enum class Format : int {")[1].split("};")[0]
    assert [line.split(",")[0].strip() for line in body.strip().splitlines()] == FORMATS


@pytest.mark.parametrize("name", CASES)
def test_every_scheme_and_schedule(hostexec: Any, name: str) -> None:
    library = build(hostexec, name, "Half")
    options = list(hostexec.all_options())
    for i, values in enumerate(CASES[name][1]):
        scheme = Scheme.from_dict(values)
        for j, (n, k) in enumerate(SHAPES):
            if k < getattr(scheme, "group_size", 0):
                continue
            qt = random_weight(scheme, (n, k))
            bias = torch.randn(n).half() if j % 2 else None
            run = Run(hostexec, library, name, qt, bias)
            for tokens in ((1, 30), (9, 65))[j % 2]:
                x = torch.randn(tokens, k).half()
                want = x.double() @ decoded(qt).T + (0 if bias is None else bias.double())
                several = {bytes(run(x, torch.float16, options=o).numpy()) for o in options[(i + j) % 2 :: 3]}
                assert len(several) == 1  # the order of threads does not matter, bit for bit
                y = torch.frombuffer(bytearray(several.pop()), dtype=torch.float16).view(tokens, n)
                agree(y, want, TOLERANCE[torch.float16])


@pytest.mark.parametrize("name", CASES)
def test_bf16(hostexec: Any, name: str) -> None:
    library = build(hostexec, name, "BFloat")
    for values in CASES[name][1]:
        qt = random_weight(Scheme.from_dict(values), (130, 328))
        bias = torch.randn(130).bfloat16()
        run = Run(hostexec, library, name, qt, bias)
        for tokens, scale in [(1, 1.0), (12, 1e4), (70, 1e-4)]:
            x = (torch.randn(tokens, 328) * scale).bfloat16()
            y = run(x, torch.bfloat16, options=hostexec.Options("random", seed=tokens))
            agree(y, x.double() @ decoded(qt).T + bias.double(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("m", [32, 39])
def test_a_rate_with_a_kernel_of_its_own(hostexec: Any, m: int) -> None:
    """The same bits as from the kernel that learns the rate at run time; for odd m a tile's last bytes repeat."""
    source = [HERE / "gemm_entry.cpp"]
    fragment = f"GEMM_FORMAT=W4A16<TrellisFragment<Half,{(m + 1) // 2}>>"
    library = hostexec.build(source, defines=[fragment, "GEMM_ONE_SHAPE=1"])
    qt = random_weight(Scheme.from_dict({"codec": "trellis", "rate": m / 16, "window": 12}), (200, 328))
    x = torch.randn(7, 328).half()
    y = Run(hostexec, library, "trellis", qt, None)(x, torch.float16)
    agree(y, x.double() @ decoded(qt).T, TOLERANCE[torch.float16])
    assert torch.equal(y, Run(hostexec, build(hostexec, "trellis", "Half"), "trellis", qt, None)(x, torch.float16))


@pytest.mark.parametrize("tokens", TOKENS)
def test_numbers_of_tokens_exactly(hostexec: Any, tokens: int) -> None:
    """Whole numbers small enough that nothing is rounded: one right answer, with any split."""
    scheme = IntScheme(bits=4, group_size=64, symmetric=False)
    qt = random_weight(scheme, (70, 320))
    qt.fields["scale"] = torch.ones_like(qt.fields["scale"])
    x = torch.zeros(tokens, 320)
    x.scatter_(1, torch.randint(0, 320, (tokens, 40)), torch.randint(-2, 3, (tokens, 40)).float())
    run = Run(hostexec, build(hostexec, "int4", "Half"), "int4", qt, None)
    want = x.double() @ decoded(qt).T
    assert float(want.abs().max()) <= 2048
    for shares, invariant in itertools.product((1, 2, 7), (False, True)):
        y = run(x.half(), torch.float16, shares=shares, invariant=invariant)
        assert torch.equal(y.double(), want)


@pytest.mark.parametrize("name", CASES)
def test_identity_gives_back_the_weight(hostexec: Any, name: str) -> None:
    """One-hot activations: every weight by itself, as the codec decodes it."""
    scheme = Scheme.from_dict(CASES[name][1][0])
    qt = random_weight(scheme, (72, 128))
    y = Run(hostexec, build(hostexec, name, "Half"), name, qt, None)(torch.eye(128).half(), torch.float16)
    assert torch.equal(y, decoded(qt).T.to(torch.float16))


def test_a_token_alone_or_among_others(hostexec: Any) -> None:
    """Batch-invariant: the same bits for a token whatever is computed with it."""
    qt = random_weight(IntScheme(bits=4, group_size=64), (200, 648))
    run = Run(hostexec, build(hostexec, "int4", "Half"), "int4", qt, None)
    x = torch.randn(70, 648).half()
    whole = run(x, torch.float16, invariant=True, shares=5)
    for tokens in (1, 8, 40):
        assert torch.equal(run(x[:tokens], torch.float16, invariant=True, shares=2), whole[:tokens])


def test_a_plan_for_more_tokens_and_little_shared_memory(hostexec: Any) -> None:
    qt = random_weight(IntScheme(bits=4, group_size=64), (200, 648))
    run = Run(hostexec, build(hostexec, "int4", "Half"), "int4", qt, None)
    x = torch.randn(5, 648).half()
    want = x.double() @ decoded(qt).T
    for limit in (60_000, 80_000, 99 * 1024, 227 * 1024):  # 2, 3, 4 and 6 steps under way
        agree(run(x, torch.float16, plan_tokens=8, shared_limit=limit), want, 1e-3)
    with pytest.raises(hostexec.LaunchError, match="gemm_plan returned 1"):
        run(x, torch.float16, shared_limit=30_000)


def test_what_cannot_be_launched(hostexec: Any) -> None:
    qt = random_weight(IntScheme(bits=4, group_size=192), (64, 192))
    run = Run(hostexec, build(hostexec, "int4", "Half"), "int4", qt, None)
    with pytest.raises(hostexec.LaunchError, match="gemm_run returned 1"):  # groups of no power of two
        run(torch.randn(1, 192).half(), torch.float16)
    qt = random_weight(IntScheme(bits=4), (64, 190))
    run = Run(hostexec, build(hostexec, "int4", "Half"), "int4", qt, None)
    with pytest.raises(hostexec.LaunchError, match="gemm_run returned 1"):  # rows that are not on 16 bytes
        run(torch.randn(1, 190).half(), torch.float16)
    assert run(torch.nn.functional.pad(torch.randn(1, 190), (0, 2)).half(), torch.float16).isfinite().all()


# -- int8 activations

A8 = {
    "ChannelA8<{act}, 4>": ("int4", [{"codec": "int", "bits": 4}, {"codec": "int", "bits": 4, "symmetric": False}]),
    "ChannelA8<{act}, 8>": ("int8", [{"codec": "int", "bits": 8}, {"codec": "int", "bits": 8, "symmetric": False}]),
    "GroupedA8<{act}>": (
        "int4",
        [
            {"codec": "int", "bits": 4, "group_size": 128, "symmetric": False},
            {"codec": "int", "bits": 4, "group_size": 32},
        ],
    ),
    "ProgressiveA8<{act}>": (
        "progressive",
        [
            {"codec": "int", "bits": 4, "group_size": 64, "progressive": True, "symmetric": False},
            {"codec": "int", "bits": 4, "group_size": 32, "progressive": True},
        ],
    ),
}


def int8_tokens(tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes [tokens, k], the same as the kernel wants them, scale [tokens], sum [tokens])."""
    codes = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
    padded = torch.nn.functional.pad(codes, (0, -k % 64))
    stored = padded.view(tokens, -1, 4)[:, :, [0, 2, 1, 3]].reshape(tokens, -1)
    return codes, stored, torch.rand(tokens) * 0.01 + 0.001, codes.sum(1, dtype=torch.int32)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("fragment", A8)
def test_int8_activations(hostexec: Any, fragment: str, act: str) -> None:
    dtype = ACTIVATIONS[act]
    name, schemes = A8[fragment]
    library = hostexec.build([HERE / "gemm_entry.cpp"], defines=[f"GEMM_FORMAT={fragment.format(act=act)}"])
    for values, (n, k) in itertools.product(schemes, SHAPES):
        scheme = Scheme.from_dict(values)
        if k < getattr(scheme, "group_size", 0):
            continue
        qt = random_weight(scheme, (n, k)) if name != "progressive" else quantize_tensor(torch.randn(n, k), scheme)
        bias = torch.randn(n).to(dtype)
        run = Run(hostexec, library, name, qt, bias)
        for tokens in (1, 9, 65) if n == 200 else (30,):
            codes, stored, scale, total = int8_tokens(tokens, k)
            option = hostexec.Options("random", seed=tokens, copies="eager" if tokens % 2 else "lazy")
            y = run(stored, dtype, scale=scale, total=total, options=option)
            want = (codes.double() @ decoded(qt).T) * scale.double()[:, None] + bias.double()
            agree(y, want, TOLERANCE[dtype])


@pytest.mark.parametrize("fragment", [f for f in A8 if not f.startswith("Grouped")])
def test_int8_sums_are_exact(hostexec: Any, fragment: str) -> None:
    """Bit for bit what int32 arithmetic gives, then two multiplications in fp32 and one rounding."""
    name, schemes = A8[fragment]
    library = hostexec.build([HERE / "gemm_entry.cpp"], defines=[f"GEMM_FORMAT={fragment.format(act='BFloat')}"])
    for values in schemes:
        scheme = Scheme.from_dict(values)
        qt = quantize_tensor(torch.randn(70, 648), scheme)
        row = qt.fields["scale"].float().view(70, -1)[:, 0]
        levels = (decoded(qt) / row.double()[:, None]).round()
        codes, stored, scale, total = int8_tokens(17, 648)
        y = Run(hostexec, library, name, qt, None)(stored, torch.bfloat16, scale=scale, total=total)
        exact = codes.double() @ levels.T
        assert torch.equal(y, (exact.float() * row * scale[:, None]).bfloat16())
