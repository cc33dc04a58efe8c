"""bitsandbytes' NF4 linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peer_weight import Source

from bitpalette.kernel_bench.contender import Absent, Call, Contender

HOW = "pip install bitsandbytes"
BLOCK = 64


def contenders(source: Source, threads: int) -> Iterator[Contender | Absent]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        yield Absent("bitsandbytes", "NF4", f"{error}: {HOW}")
        return
    out, n = source.shape
    yield Contender(
        kernel="bitsandbytes",
        scheme=f"NF4, block {BLOCK}",
        isa="",
        dtype="bfloat16",
        shape=source.shape,
        nbytes=out * n // 2 + 4 * (out * n // BLOCK),
        first=_layer(source),
        new_copy=_maker(source),
        to_input=lambda x: x.bfloat16(),
        expected=source.expected(),
    )


def _maker(source: Source) -> Callable[[], Call]:
    return lambda: _layer(source)


def _layer(source: Source) -> Call:
    from bitsandbytes.nn import Linear4bit

    out, n = source.shape
    layer = Linear4bit(n, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta")
    kind = type(layer.weight)
    layer.weight = kind(source.repeat(source.rows), requires_grad=False, quant_type="nf4", blocksize=BLOCK)
    return layer.to("cpu").eval()  # quantizes
