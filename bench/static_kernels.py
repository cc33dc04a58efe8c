"""Which kernel a mangled name is, what one round of its main loop works on, and what must be there for that.

Everything is read from the names of the templates; csrc/cuda/gemm_body.cuh has the sizes behind `GemmShape`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"

SUPERBLOCK = 64
TILE = 16
LANES = 32
TYPES = {"Half": "fp16", "BFloat": "bf16"}
DTYPES = ("fp32", "fp16", "bf16")  # enum class Dtype in csrc/cpu/dtype.h

# type of the template -> (format, bits of a weight, of the trellis 0 where they are known at run time only)
_FRAGMENTS: dict[str, tuple[str, float]] = {
    "LutFragment<{act}, 2>": ("lut2", 2),
    "LutFragment<{act}, 3>": ("lut3", 3),
    "PairFragment<{act}>": ("lut4", 4),
    "E4M3Fragment<{act}>": ("e4m3", 8),
    **{f"TrellisFragment<{{act}}, {words}>": ("trellis", words / 8) for words in (0, 16, 20, 24, 28, 32)},
    **{f"IntFragment<{{act}}, {bits}>": (f"int{bits}", bits) for bits in (2, 3, 4, 8)},
}
_INT8: dict[str, tuple[str, float]] = {
    "ChannelA8<{act}, 4>": ("int4 channel", 4),
    "ChannelA8<{act}, 8>": ("int8 channel", 8),
    "GroupedA8<{act}>": ("int4 grouped", 4),
    "ProgressiveA8<{act}>": ("int4 progressive", 4),
}


@dataclass(frozen=True)
class Kernel:
    """One instance; numbers are 0 where a kernel has no main loop.

    type: of activations. bits: of a weight, 0 where they are known at run time only. tokens: of an output tile, of
    gemv_i8 the int8 vectors. weights: that a lane decodes in a round of the main loop. matrix: matrix instructions in
    a round. row_tiles: 16 rows of the weight, of a warp. order: where it stands in a table.
    """

    name: str
    family: str
    format: str = ""
    type: str = ""
    bits: float = 0
    tokens: int = 0
    weights: int = 0
    matrix: int = 0
    row_tiles: int = 0
    order: tuple[int, ...] = ()


class UnknownKernelError(ValueError):
    """A kernel that this file does not know: it would pass every check unseen."""


def demangle(names: Iterable[str]) -> dict[str, str]:
    """{mangled: demangled, without namespace, return type and arguments}."""
    names = list(names)
    if (tool := shutil.which("c++filt")) is None:
        raise FileNotFoundError("c++filt, which names the kernels, is not on PATH: install binutils")
    text = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    plain = (line.replace("bitpalette::", "").removeprefix("void ") for line in text.splitlines())
    return {name: line.rpartition("(")[0] or line for name, line in zip(names, plain, strict=True)}


@cache
def _formats() -> tuple[str, ...]:
    """enum class Format, in its order."""
    source = (CUDA / "container.cuh").read_text()
    body = re.search(r"enum class Format : int \{(.*?)\};", source, re.DOTALL)
    if body is None:
        raise UnknownKernelError(
            f"{CUDA / 'container.cuh'} has no `enum class Format : int`: bench/static.py names by it"
        )
    return tuple(re.findall(r"^\s*(\w+),", body[1], re.MULTILINE))


def kernel(demangled: str) -> Kernel:
    """`gemm_kernel<GemmShape<8, 2, 4, 1>, W4A16<IntFragment<Half, 4> > >` is "gemm int4 fp16 8 tokens"."""
    text = demangled.replace("> >", ">>").replace("> >", ">>")
    if match := re.fullmatch(r"gemm_kernel<GemmShape<(\d+), (\d+), (\d+), (\d+)>, (.*)>", text):
        return _gemm(match[5], int(match[1]), int(match[4]))
    if match := re.fullmatch(r"gemv_i8_kernel<(\d+), (\d+)>", text):
        return _gemv(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(dequantize|embedding)_kernel<\(Format\)(\d+), \(Dtype\)(\d+)>", text):
        form, dtype = int(match[2]), int(match[3])
        name = f"{match[1]} {_formats()[form]} {DTYPES[dtype]}"
        return Kernel(name, match[1], _formats()[form], order=(form, dtype))
    if match := re.fullmatch(r"transform_input_kernel<\(Dtype\)(\d+), (true|false)>", text):
        dtype, where = int(match[1]), "shared" if match[2] == "true" else "global"
        return Kernel(
            f"transform_input {DTYPES[dtype]} rows in {where}", "transform_input", order=(dtype, where == "global")
        )
    if match := re.fullmatch(r"kv_attention_kernel<(\d+), (\d+), (\d+), (\d+)>", text):
        return _kv_attention(*map(int, match.groups()))
    if text == "kv_combine_kernel<0>":
        return Kernel("kv_combine", "kv_combine")
    if match := re.fullmatch(r"kv_append_kernel<(true|false)>", text):
        return Kernel("kv_append" if match[1] == "true" else "kv_rotate", "kv_append", order=(match[1] == "false",))
    raise UnknownKernelError(f"no kernel is known by the name {demangled!r}: bench/static_kernels.py must learn it")


def _gemm(form: str, tokens: int, sharing: int) -> Kernel:
    act = next((a for a in TYPES if f"{a}>" in form or f"{a}," in form), None)
    for family, table in (("gemm", {f"W4A16<{t}>": v for t, v in _FRAGMENTS.items()}), ("gemm_w4a8", _INT8)):
        for order, (template, (name, bits)) in enumerate(table.items()):
            if act is not None and form == template.format(act=act):
                row_tiles = SUPERBLOCK // TILE // sharing
                columns = 16 if family == "gemm" else 32  # of m16n8k16, m16n8k32
                rate = f" {_rate(bits)}" if name == "trellis" else ""
                return Kernel(
                    f"{family} {name}{rate} {TYPES[act]} {tokens} tokens",
                    family,
                    name,
                    TYPES[act],
                    bits,
                    tokens,
                    weights=row_tiles * TILE * SUPERBLOCK // LANES,
                    matrix=row_tiles * (SUPERBLOCK // columns) * (tokens // 8),
                    row_tiles=row_tiles,
                    order=(list(TYPES).index(act), order, tokens),
                )
    raise UnknownKernelError(
        f"no format of a GEMM is known by the name {form!r}: bench/static_kernels.py must learn it"
    )


def _gemv(tile_words: int, vectors: int) -> Kernel:
    bits = tile_words / 8
    name = f"gemv_i8 trellis {_rate(bits)} {vectors} vector{'s' if vectors > 1 else ''}"
    weights = SUPERBLOCK * SUPERBLOCK // LANES
    return Kernel(name, "gemv_i8", "trellis", "int8", bits, vectors, weights=weights, order=(tile_words, vectors))


KV_STEP = 32
"""Tokens of a round of attention over the cache, each with a key and a value."""


def _kv_attention(width: int, tiles: int, bits_k: int, bits_v: int) -> Kernel:
    """A round of those that know their bits is counted; the others have a way through for each pair of bits."""
    name = f"kv_attention {'any bits' if bits_k == 0 else f'k{bits_k}v{bits_v}'} head_dim {width} {8 * tiles} queries"
    order = (width, tiles, bits_k, bits_v)
    if bits_k == 0:
        return Kernel(name, "kv_attention", type="fp16", tokens=8 * tiles, order=order)
    return Kernel(
        name,
        "kv_attention",
        "kv",
        "fp16",
        (bits_k + bits_v) / 2,
        8 * tiles,
        weights=2 * KV_STEP * width // LANES,
        matrix=2 * KV_STEP // TILE * width // TILE * tiles,
        order=order,
    )


def _rate(bits: float) -> str:
    return f"{bits:g} bits" if bits else "any rate"


def trellis_encode(row_bits: int, window: int) -> Kernel:
    """The encoder, which is compiled for one rate and window at a time."""
    return Kernel(f"trellis_encode m={row_bits} L={window}", "trellis_encode", order=(row_bits, window))
