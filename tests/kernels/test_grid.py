"""Every kernel of the registry, on every scheme and shape it says it can run, against the codec's reference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import pytest
import torch

from bitpalette.kernels.base import Kernel
from bitpalette.kernels.cpu_int import CpuIntKernel
from bitpalette.kernels.isa import OnInstructionSet
from bitpalette.kernels.registry import kernels
from bitpalette.quant.bitstream import pack_bits
from bitpalette.quant.codec import codec_names, get_codec
from bitpalette.quant.int import IntScheme
from bitpalette.quant.native import available_isas
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, field_specs

# rtn of the codecs that are fitted rather than filled with random fields takes its time on the largest
SHAPES = [(1, 1), (1, 1536), (17, 123), (123, 577), (1536, 17), (577, 576), (16, 1537), (48, 64)]
TOKENS = [0, 1, 2, 3, 8, 9, 33]  # native kernels take from 9 or 32 on another way
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}

EXAMPLES: dict[str, list[dict]] = {
    "float": [
        *({"codec": "float", "element": e, "group_size": g} for e in ("e2m1", "e2m3", "e3m2", "e4m3") for g in (0, 64)),
        *(
            {"codec": "float", "element": e, "group_size": 32, "scale_format": "e8m0"}
            for e in ("e2m1", "e2m3", "e3m2", "e4m3")
        ),
        {"codec": "float", "group_size": 16, "scale_format": "e4m3"},
    ],
    "int": [
        {"codec": "int", "bits": bits, "symmetric": symmetric, **rest}
        for bits in range(1, 9)
        for symmetric in (True, False)
        for rest in ({}, {"group_size": 32}, {"group_size": 64}, {"group_size": 128}, {"per_input_channel": True})
    ]
    + [
        {"codec": "int", "group_size": size, "symmetric": symmetric, "progressive": True}
        for size in (32, 64, 128)
        for symmetric in (True, False)
    ],
    "lut": [
        {"codec": "lut"},
        {"codec": "lut", "table": "nf4", "group_size": 64},
        {"codec": "lut", "entries": 4, "group_size": 32},
        {"codec": "lut", "entries": 8},
        {"codec": "lut", "entries": 24, "table": "kmeans"},
        {"codec": "lut", "entries": 5, "table": "values", "values": [-3.0, -1.0, 0.0, 0.5, 2.0]},
        *(
            {"codec": "lut", "entries": entries, "table": "kmeans", "table_scope": "row", "scaled": False}
            for entries in (4, 6, 8, 11, 16)
        ),
        {"codec": "lut", "entries": 16, "table": "kmeans", "table_scope": "row", "group_size": 64},
        {"codec": "lut", "entries": 64, "dims": 2},
        {"codec": "lut", "entries": 64, "dims": 2, "group_size": 64},
    ],
    "trellis": [{"codec": "trellis", "rate": m / 16, "window": 12} for m in (16, 23, 24, 36, 40, 64, 80)]
    + [{"codec": "trellis", "rate": 2.0, "window": window} for window in (14, 16)],
}


def schemes() -> list[Scheme]:
    return [Scheme.from_dict(values) for name in codec_names() for values in EXAMPLES.get(name, [])]


def variants(kernel: Kernel) -> Iterator[tuple[str, Kernel]]:
    """The kernel, once for each instruction set where it has several."""
    if isinstance(kernel, OnInstructionSet):
        for isa in available_isas():
            yield f"{kernel.name}/{isa}", type(kernel)(isa)
    else:
        yield kernel.name, kernel


def random_tensor(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    torch.manual_seed(zlib.crc32(f"{scheme} {shape}".encode()))
    if not isinstance(scheme, IntScheme) or scheme.progressive:
        return quantize_tensor(torch.randn(shape), scheme)
    specs = field_specs(scheme, shape)
    rows, groups = specs["scale"][0]
    fields = {
        "codes": pack_bits(torch.randint(0, 1 << scheme.bits, shape, dtype=torch.uint8), scheme.bits).flatten(),
        "scale": (torch.randn(rows, groups) * 0.05).half(),
    }
    if not scheme.symmetric:
        zeros = torch.randint(0, 1 << scheme.bits, (rows, groups), dtype=torch.uint8)
        fields["zero_point"] = pack_bits(zeros, scheme.bits)
    return QuantizedTensor(scheme, shape, fields)


def fits(scheme: Scheme, shape: tuple[int, int]) -> bool:
    try:
        scheme.check_shape(shape)
    except SchemeError:
        return False
    return True


def test_every_codec_has_example_schemes() -> None:
    assert set(codec_names()) <= set(EXAMPLES), "add example schemes of the new codec to EXAMPLES"


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_kernels_against_the_codec(scheme: Scheme) -> None:
    codec, cpu = get_codec(scheme.codec), torch.device("cpu")
    for shape in (shape for shape in SHAPES if fits(scheme, shape)):
        qt = random_tensor(scheme, shape)
        w = codec.decode(qt)
        x = torch.randn(max(TOKENS), shape[1])
        bias = torch.randn(shape[0])
        for kernel in kernels().values():
            if kernel.why_not(scheme, shape, cpu) is not None:
                continue
            for label, variant in variants(kernel):
                packed = variant.prepare(qt)
                back = variant.unprepare(packed)
                assert back.fields.keys() == qt.fields.keys()
                for name in qt.fields:
                    assert torch.equal(back.fields[name], qt.fields[name]), f"{label} {shape} {name}"
                index = torch.randint(0, shape[0], (5,))
                assert torch.equal(variant.rows(packed, index), w[index]), f"{label} {shape} rows"
                for i, tokens in enumerate(TOKENS):
                    dtype = DTYPES[i % len(DTYPES)]
                    z = x[:tokens].to(dtype)
                    b = bias.to(dtype) if tokens % 2 else None
                    y = variant.linear(z, packed, b)
                    assert y.shape == (tokens, shape[0]) and y.dtype == dtype
                    reference = z.float() @ w.T
                    if b is not None:
                        reference = reference + b.float()
                    error = (y.float() - reference).norm()
                    # a single output may be near zero by chance: never ask for less than the norm that x and W have
                    norm = max(float(reference.norm()), float(z.float().norm() * w.norm()) / math.sqrt(shape[1]))
                    allowed = (codec.tolerance(scheme) + ROUNDING[dtype]) * norm
                    assert error <= allowed, f"{label} {shape} tokens={tokens} {dtype}: {error} of {norm}"


@pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(isa: str, bad: float) -> None:
    kernel = CpuIntKernel(isa)
    packed = kernel.prepare(random_tensor(IntScheme(bits=4, group_size=32), (40, 100)))
    for dtype in DTYPES:
        x = torch.randn(3, 100).to(dtype)
        x[1, 97] = bad
        y = kernel.linear(x, packed, None)
        assert not bool(y[1].isfinite().any())
        assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_inputs_of_any_magnitude(isa: str, size: float) -> None:
    kernel, scheme = CpuIntKernel(isa), IntScheme(bits=4, group_size=64, symmetric=False)
    qt = random_tensor(scheme, (33, 130))
    packed, w = kernel.prepare(qt), get_codec("int").decode(qt)
    x = torch.randn(2, 130) * size
    error = (kernel.linear(x, packed, None) - x @ w.T).norm()
    assert error <= 0.02 * (x @ w.T).norm() + 1e-38


@pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")
@pytest.mark.parametrize("isa", available_isas())
def test_every_half_scale_and_every_half_output(isa: str) -> None:
    """All finite fp16 values as scales (subnormals too), and outputs rounded to fp16 as torch rounds."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    scale = every[every.isfinite()][:, None].contiguous()
    out = scale.shape[0]
    codes = torch.full((out, 16), 0x99, dtype=torch.uint8).flatten()  # every code is 9: one above the zero point
    scheme = IntScheme(bits=4)
    kernel = CpuIntKernel(isa)
    packed = kernel.prepare(QuantizedTensor(scheme, (out, 32), {"codes": codes, "scale": scale}))
    assert torch.equal(kernel.rows(packed, torch.arange(out))[:, :1], scale.float())
    x = torch.zeros(1, 32)
    x[0, 0] = 127.0  # its tile's scale is 1 and its code 127: the output is 127 * scale, exactly, in float32
    for factor in (1.0, 1 / 128):
        exact = (127 * factor) * scale.float().T
        for dtype in DTYPES:
            y = kernel.linear((x * factor).to(dtype), packed, None)
            assert torch.equal(y, exact.to(dtype)), f"{factor} {dtype}"
