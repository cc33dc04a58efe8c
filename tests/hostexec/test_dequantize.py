"""dequantize and embedding on the host executor: exactly what the codec decodes, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.kernels.tiles import pack_tiles
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import get_codec
from bitpalette.quant.float import FloatScheme
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.tensor import QuantizedTensor
from bitpalette.quant.trellis import TrellisScheme

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"

FORMATS = ["int2", "int3", "int4", "int8", "progressive", "lut2", "lut3", "lut4", "e4m3", "trellis"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHAPES = [(1, 1), (17, 123), (64, 64), (123, 576), (130, 65)]
SCHEMES: list[Scheme] = [
    *(IntScheme(bits=b) for b in (2, 3, 4, 8)),
    *(IntScheme(bits=b, group_size=32, symmetric=False) for b in (2, 3, 4, 8)),
    IntScheme(bits=4, group_size=64),
    IntScheme(bits=4, group_size=128, symmetric=False),
    IntScheme(bits=3, group_size=192, symmetric=False),
    *(IntScheme(bits=4, group_size=g, progressive=True) for g in (32, 64)),
    IntScheme(bits=4, group_size=128, progressive=True, symmetric=False),
    LutScheme(entries=4, group_size=64),
    LutScheme(entries=5),
    LutScheme(entries=8, group_size=32),
    LutScheme(entries=11, group_size=64),
    LutScheme(entries=16, group_size=128),
    LutScheme(entries=16, table="kmeans", scaled=False),
    FloatScheme(element="e2m1", group_size=32),
    FloatScheme(element="e4m3", group_size=64),
    FloatScheme(element="e4m3"),
    *(TrellisScheme(rate=r) for r in (1, 2, 2.0625, 2.5, 3, 3.9375, 5)),
    TrellisScheme(rate=2.25, window=14),
    TrellisScheme(rate=4.0625, window=12),
]


def random_weight(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    """Any codes, scales of either sign, any zero points: nothing that a quantizer would have to choose."""
    g = torch.Generator().manual_seed(shape[0] * 1009 + shape[1])
    fields: dict[str, Tensor] = {}
    for name, (size, dtype) in get_codec(scheme.codec).fields(scheme, shape).items():
        if name == "table":
            fields[name] = torch.randn(size, generator=g).sort().values.to(dtype)
        elif dtype == torch.float16:
            fields[name] = (torch.randn(size, generator=g) * 0.1).to(dtype)
        else:
            fields[name] = torch.randint(0, 256, size, generator=g, dtype=dtype)
    if isinstance(scheme, LutScheme):
        codes = torch.randint(0, scheme.entries, shape, generator=g, dtype=torch.uint8)
        fields["codes"] = pack_bits(codes, scheme.bits).flatten()
    if isinstance(scheme, IntScheme) and scheme.progressive:  # within what the packer lets through
        fields["group_scale"] = fields["group_scale"] % 7 + 1
    if isinstance(scheme, FloatScheme) and scheme.element == "e4m3":
        fields["codes"][fields["codes"] & 127 == 127] = 0  # NaN
    return QuantizedTensor(scheme, shape, fields)


def format_of(scheme: Scheme) -> str:
    if isinstance(scheme, IntScheme):
        return "progressive" if scheme.progressive else f"int{scheme.bits}"
    if isinstance(scheme, LutScheme):
        return "lut2" if scheme.entries <= 4 else "lut3" if scheme.entries <= 8 else "lut4"
    if isinstance(scheme, FloatScheme):
        return "lut4" if scheme.element == "e2m1" else "e4m3"
    return "trellis"


@dataclass
class Container:
    """A packed weight in guarded buffers, as the first arguments of an entry point."""

    scheme: Scheme
    shape: tuple[int, int]
    tensors: dict[str, Any]

    def arguments(self) -> list[Any]:
        names = ["codes", "scale", "zero_point", "table", "group_scale", "group_offset"]
        group_size = getattr(self.scheme, "group_size", 0)
        row_bits, window = getattr(self.scheme, "row_bits", 0), getattr(self.scheme, "window", 0)
        numbers = [*self.shape, group_size, row_bits, window]
        return [FORMATS.index(format_of(self.scheme)), *(self.tensors.get(n) for n in names), *numbers]


@pytest.fixture(scope="module")
def library(hostexec: Any) -> Any:
    sources = [CUDA / "dequantize.cu", CUDA / "embedding.cu", HERE / "dequantize_entry.cpp"]
    return hostexec.build(sources)


def container(hostexec: Any, qt: QuantizedTensor) -> Container:
    tensors = {name: hostexec.guarded(t) for name, t in pack_tiles(qt).items()}
    return Container(qt.scheme, (qt.shape[0], qt.shape[1]), tensors)


def shapes(scheme: Scheme) -> list[tuple[int, int]]:
    return [shape for shape in SHAPES if shape[1] >= getattr(scheme, "group_size", 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_is_what_the_codec_decodes(hostexec: Any, library: Any, scheme: Scheme, dtype: torch.dtype) -> None:
    for n, k in shapes(scheme):
        qt = random_weight(scheme, (n, k))
        want = get_codec(scheme.codec).decode(qt).to(dtype)
        # rows on 4 elements or not; what is between them is nobody's
        for stride in (k, k + 3) if k == 65 or k == 576 else (k,):
            out = hostexec.guarded(torch.full((n, stride), torch.nan, dtype=dtype))
            library.call("run_dequantize", *container(hostexec, qt).arguments(), out, stride, DTYPES[dtype])
            assert torch.equal(out.tensor[:, :k], want)
            assert out.tensor[:, k:].isnan().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_embedding_rows(hostexec: Any, library: Any, scheme: Scheme) -> None:
    dtype = list(DTYPES)[SCHEMES.index(scheme) % 3]  # the two kernels store alike
    for n, k in [(17, 576), (130, 201)]:
        qt = random_weight(scheme, (n, k))
        index = torch.tensor([n - 1, 0, 0, n // 2, 16])
        want = get_codec(scheme.codec).decode(qt)[index].to(dtype)
        out = hostexec.guarded(torch.full((len(index), k), torch.nan, dtype=dtype))
        where = hostexec.guarded(index)
        library.call("run_embedding", *container(hostexec, qt).arguments(), where, out, len(index), k, DTYPES[dtype])
        assert torch.equal(out.tensor, want)


def test_embedding_of_many_columns_and_of_no_rows(hostexec: Any, library: Any) -> None:
    qt = random_weight(IntScheme(bits=4), (3, 1537))  # four blocks to a row
    weight = container(hostexec, qt)
    out = hostexec.guarded(torch.full((2, 1537), torch.nan))
    library.call("run_embedding", *weight.arguments(), hostexec.guarded(torch.tensor([2, 1])), out, 2, 1537, 0)
    assert torch.equal(out.tensor, get_codec("int").decode(qt)[[2, 1]])
    library.call("run_embedding", *weight.arguments(), None, None, 0, 1537, 0)


def test_nan_of_e4m3(hostexec: Any, library: Any) -> None:
    qt = random_weight(FloatScheme(element="e4m3"), (2, 3))
    qt.fields["codes"][1], qt.fields["codes"][5] = 127, 255
    out = hostexec.guarded(torch.zeros(2, 3))
    library.call("run_dequantize", *container(hostexec, qt).arguments(), out, 3, 0)
    assert out.tensor.isnan().tolist() == [[False, True, False], [False, False, True]]


def test_a_wrong_call_is_refused_with_its_numbers(hostexec: Any, library: Any) -> None:
    def refusal(function: str, *args: Any) -> str:
        with pytest.raises(RuntimeError, match="returned -1"):
            library.call(function, *args)
        text = hostexec.guarded(np.zeros(512, np.uint8))
        library.call("refused", text, 512)
        return bytes(text.array).rstrip(b"\0").decode()

    weight = container(hostexec, random_weight(IntScheme(bits=4), (5, 70))).arguments()
    assert "rows of 70 columns, 69 elements apart" in refusal("run_dequantize", *weight, None, 69, 0)
    assert "groups of 48 columns" in refusal("run_dequantize", *weight[:9], 48, 0, 0, None, 70, 0)
    assert "number 7" in refusal("run_dequantize", *weight, None, 70, 7)
    assert "-1 rows of 70" in refusal("run_embedding", *weight, None, None, -1, 70, 0)
    trellis = container(hostexec, random_weight(TrellisScheme(rate=2), (5, 70))).arguments()
    assert "trellis of 32 bits in 16 weights, window 13" in refusal("run_dequantize", *trellis[:-1], 13, None, 70, 0)
