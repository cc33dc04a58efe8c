"""gemv_i8 on the host executor: the integer sums are exact, so the result is known to the last bit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels.tiles import pack_tiles
from bitpalette.quant.codec import get_codec
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import TrellisScheme, levels

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def padded(n: int) -> int:
    return -(-n // 64) * 64


def random_weight(rate: float, window: int, shape: tuple[int, int]) -> QuantizedTensor:
    scheme = TrellisScheme(rate=rate, window=window)
    g = torch.Generator().manual_seed(shape[0] * 1009 + shape[1])
    size, dtype = get_codec("trellis").fields(scheme, shape)["codes"]
    codes = torch.randint(0, 256, size, generator=g, dtype=dtype)
    scale = (torch.rand(shape[0], generator=g) + 0.5).to(torch.float16)
    return QuantizedTensor(scheme, shape, {"codes": codes, "scale": scale})


def exact_levels(qt: QuantizedTensor) -> Tensor:
    ones = {**qt.fields, "scale": torch.full_like(qt.fields["scale"], 128)}
    return get_codec("trellis").decode(QuantizedTensor(qt.scheme, qt.shape, ones)).long()


def in_order(x: Tensor) -> Tensor:
    """int8 [tokens, K] -> [tokens, KP], columns of every four in the order 0, 2, 1, 3."""
    wide = torch.nn.functional.pad(x, (0, padded(x.shape[1]) - x.shape[1]))
    return wide.view(len(x), -1, 4)[:, :, [0, 2, 1, 3]].reshape(len(x), -1).to(torch.int8)


@pytest.fixture(scope="module")
def library(hostexec: Any) -> Any:
    return hostexec.build([CUDA / "gemv_i8.cu", HERE / "gemv_i8_entry.cpp"])


class Call:
    """One product on the executor, and what it must be."""

    def __init__(
        self, hostexec: Any, library: Any, qt: QuantizedTensor, x: Tensor, planes: bool, dtype: torch.dtype, bias: bool
    ) -> None:
        # x: integers, |x| <= 127, or <= 32512 with two planes
        self.hostexec, self.library, self.planes, self.dtype = hostexec, library, planes, dtype
        self.qt, self.x = qt, x
        (self.n, self.k), self.tokens = qt.shape, len(x)
        scheme = qt.scheme
        assert isinstance(scheme, TrellisScheme)
        high = (x + 128) >> 8 if planes else x
        guarded = hostexec.guarded
        tensors = pack_tiles(qt)
        self.scale = torch.rand(self.tokens, generator=torch.Generator().manual_seed(1)) + 0.01
        self.bias = torch.randn(self.n, generator=torch.Generator().manual_seed(2)).to(dtype) if bias else None
        self.inputs = [
            guarded(tensors["codes"]),
            guarded(tensors["scale"]),
            self.n,
            self.k,
            scheme.row_bits,
            scheme.window,
            guarded(in_order(high)),
            guarded(in_order(x - 256 * high)) if planes else None,
            guarded(self.scale),
            guarded(x.sum(1).to(torch.int32)),
            None if self.bias is None else guarded(self.bias),
        ]

    def want(self) -> Tensor:
        total = (self.x @ exact_levels(self.qt).T).numpy().astype(np.float32)
        token = self.scale.numpy()[:, None] * np.float32(1 / 256 if self.planes else 1)
        row = self.qt.fields["scale"].float().numpy()[None] / np.float32(128)
        y = (total * token).astype(np.float64) * row  # a product of two float32 is exact
        if self.bias is not None:
            y = y + self.bias.double().numpy()
        return torch.from_numpy(y.astype(np.float32)).to(self.dtype)

    def run(self, blocks: int, options: Any = None, calls: int = 1) -> Tensor:
        stride = self.n + 5
        out = self.hostexec.guarded(torch.full((self.tokens, stride), torch.nan, dtype=self.dtype))
        size = self.hostexec.guarded(np.zeros(1, np.int64))
        self.library.call("workspace_bytes", self.n, self.tokens, blocks, size)
        space = torch.full(
            (int(size.array[0]),), 0xFF, dtype=torch.uint8
        )  # of the sums NaN and nonsense, of the counters zero
        counters = padded(self.n) // 64 * 4
        space[:counters] = 0
        workspace = self.hostexec.guarded(space)
        arguments = [*self.inputs, out, stride, self.tokens, DTYPES[self.dtype], blocks, workspace]
        for _ in range(calls):
            out.array[...] = 0xFF
            self.library.call("run_gemv_i8", *arguments, options=options)
            assert (workspace.array[:counters] == 0).all()
        return out.tensor[:, : self.n]


def integers(tokens: int, k: int, planes: bool) -> Tensor:
    top = 32512 if planes else 127
    return torch.randint(-top, top + 1, (tokens, k), generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("planes", [False, True], ids=["int8", "planes"])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("rate", [1, 2, 2.0625, 2.5, 2.4375, 3, 3.5, 4, 4.9375, 5])
def test_every_rate(hostexec: Any, library: Any, rate: float, tokens: int, planes: bool) -> None:
    qt = random_weight(rate, 16, (123, 201))
    call = Call(hostexec, library, qt, integers(tokens, 201, planes), planes, torch.float32, bias=False)
    assert torch.equal(call.run(3), call.want())


@pytest.mark.parametrize("window", [12, 14])
def test_windows(hostexec: Any, library: Any, window: int) -> None:
    qt = random_weight(2.25, window, (65, 100))
    call = Call(hostexec, library, qt, integers(1, 100, False), False, torch.float32, bias=False)
    assert torch.equal(call.run(1), call.want())


@pytest.mark.parametrize("shape", [(1, 1), (17, 15), (64, 64), (5, 1537), (200, 576), (321, 130)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 5, 13, 1000])
def test_any_number_of_blocks_gives_the_same(hostexec: Any, library: Any, shape: tuple[int, int], blocks: int) -> None:
    qt = random_weight(2, 16, shape)
    call = Call(hostexec, library, qt, integers(2, shape[1], True), True, torch.float32, bias=False)
    assert torch.equal(call.run(blocks, calls=2), call.want())


def test_schedules(hostexec: Any, library: Any) -> None:
    qt = random_weight(3, 16, (130, 700))
    call = Call(hostexec, library, qt, integers(2, 700, True), True, torch.float32, bias=False)
    want = call.want()
    for options in hostexec.all_options(coresident=2):
        assert torch.equal(call.run(4, options), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_types_and_bias(hostexec: Any, library: Any, dtype: torch.dtype, bias: bool) -> None:
    qt = random_weight(2, 16, (77, 130))
    call = Call(hostexec, library, qt, integers(2, 130, False) // 32, False, dtype, bias)
    assert torch.equal(call.run(2), call.want())


def test_sums_beyond_32_bits(hostexec: Any, library: Any) -> None:
    """The rate whose every state repeats one nibble, and of those the one with the largest level."""
    table = levels(16)
    nibble = int(table[torch.arange(16) * 0x1111].abs().argmax())
    qt = random_weight(4, 16, (9, 65536))
    qt.fields["codes"].fill_(nibble * 17)
    level = int(table[nibble * 0x1111])
    x = torch.full((1, 65536), 127)
    call = Call(hostexec, library, qt, x, False, torch.float32, bias=False)
    assert (call.want() == np.float32(127 * 65536 * level) * call.scale * qt.fields["scale"].float() / 128).all()
    assert 127 * 65536 * abs(level) > 2**31
    assert torch.equal(call.run(1), call.want())


@pytest.mark.parametrize("rate", [1, 2, 2.4375, 3, 4])  # beyond, the word around the end meets another one's bank
def test_shared_memory_without_bank_conflicts(hostexec: Any, library: Any, rate: float) -> None:
    call = Call(
        hostexec, library, random_weight(rate, 16, (64, 128)), integers(1, 128, True), True, torch.float32, True
    )
    call.run(1, hostexec.Options(conflicts=True))
    counted = library.conflicts()
    assert counted and all(extra == 0 for _, extra in counted.values()), counted


def test_a_scale_of_nan_reaches_every_output(hostexec: Any, library: Any) -> None:
    call = Call(hostexec, library, random_weight(2, 16, (70, 64)), integers(2, 64, False), False, torch.float16, True)
    call.inputs[8] = hostexec.guarded(torch.tensor([1.0, torch.nan]))
    y = call.run(1)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_a_wrong_call_is_refused_with_its_numbers(hostexec: Any, library: Any) -> None:
    call = Call(hostexec, library, random_weight(2, 16, (70, 64)), integers(2, 64, False), False, torch.float16, True)

    def refusal(*last: Any, k: int = 64) -> str:
        inputs = [*call.inputs[:3], k, *call.inputs[4:]]
        with pytest.raises(RuntimeError, match="returned -1"):
            library.call("run_gemv_i8", *inputs, *last)
        text = hostexec.guarded(np.zeros(512, np.uint8))
        library.call("refused", text, 512)
        return bytes(text.array).rstrip(b"\0").decode()

    assert "3 tokens of 64 columns" in refusal(None, 70, 3, 0, 4, None)
    assert "tokens of 131073 columns" in refusal(None, 70, 1, 0, 4, None, k=131073)
    assert "0 blocks" in refusal(None, 70, 1, 0, 0, None)
    shifted = ctypes.c_void_p(hostexec.guarded(torch.zeros(64)).pointer + 8)
    assert "not aligned to 16 bytes" in refusal(None, 70, 1, 0, 1, shifted)
    assert "69 elements apart" in refusal(None, 69, 1, 0, 1, hostexec.guarded(torch.zeros(64)))
