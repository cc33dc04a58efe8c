"""What a plan takes in memory once it is loaded, its cache full and a token being decoded: known before it is made.

The figure is resident memory (VmHWM of the process after loading), which does not depend on what else runs; PSS does:
it shares out the pages of torch's libraries among all processes that map them. The peak is promised, since a process
that exceeds its memory while it reads the prompt does not get to decode.

A weight takes what its kernel keeps: the layout of `Kernel.prepare`, or the file's own tensors, mapped, where that is
the canonical one. The prompt is run as `bitpalette.generate` runs it: in one pass, or `chunk` tokens at a time
(transformers' prefill_chunk_size).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .calibrate.plan import PlanError
from .calibrate.structure import quantizable
from .kernel_bench.random_weight import random_weight
from .kernels.base import choose, codec_fields
from .kernels.kv_pages import GROWTH
from .kernels.kv_rows import cache_bytes
from .kv_load import packed_layers
from .plan_base import base_bytes
from .quant.kv_plan import KVPlan
from .quant.scheme import Scheme
from .quant.tensor import field_specs, stored_bytes

GB = 10**9
COMMON = (4 * GB, 6 * GB, 8 * GB, 12 * GB, 16 * GB, 24 * GB)
"""Memories of common machines, in bytes."""

BLOCK = 16
"""Rows that CPU kernels pack together (code_planes.BLOCK_ROWS): bytes of a layout grow by whole blocks."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Bytes. base: of the process before any model is in it. linears: weights in blocks; head and embeddings: a table
    that is both counts as head. other: norms, biases and all that no scheme encodes. cache: keys and values of the
    whole context. workspace: what reading the prompt takes beside that."""

    base: int
    linears: int
    head: int
    embeddings: int
    other: int
    cache: int
    workspace: int

    @property
    def weights(self) -> int:
        return self.linears + self.head + self.embeddings + self.other

    @property
    def total(self) -> int:
        return self.base + self.weights + self.cache + self.workspace


def memory_of(
    model: nn.Module,
    schemes: Mapping[str, Scheme | None],
    kv: KVPlan | None,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
    base: int | None = None,
    device: str = "cpu",
) -> Memory:
    """What a packed model with these schemes takes, its cache full.

    model: transformers', on any device ("meta": `Skeleton.model`). schemes: {parameter: scheme, or None: 16 bits}; what
    it leaves out keeps 16 bits. kv: None: transformers' own cache. context: tokens of a row, prompt and answer. dtype:
    of activations, of what keeps 16 bits, and of a dense cache. chunk: tokens that the prompt is read by; None: all
    at once. base: bytes before the model; None: as this machine measured it. PlanError for a parameter that the model
    lacks, sizes below 1, or a GPU.
    """
    if torch.device(device).type != "cpu":
        gpu = "memory of a GPU is not planned" if torch.cuda.is_available() else "no GPU here"
        raise PlanError(f"--device {device}: {gpu}; plan with --device cpu")
    if context < 1 or batch < 1 or (chunk is not None and chunk < 1):
        raise PlanError(f"--context {context}, --batch {batch} and --chunk {chunk} are numbers of 1 or more")
    weights = quantizable(model)
    if strange := sorted(set(schemes) - set(weights)):
        raise PlanError(f"{strange[0]} is no weight of {type(model).__name__}; the plan is of another model")
    parts = {"linears": 0, "head": 0, "embeddings": 0}
    for name, weight in weights.items():
        scheme = schemes.get(name)
        part = "head" if weight.head else "embeddings" if weight.embedding else "linears"
        only_rows = weight.embedding and not weight.head
        parts[part] += kept_bytes(scheme, weight.shape, dtype, only_rows=only_rows)
    counted = {id(model.get_parameter(name)) for name in weights}
    rest = {id(p): p.numel() for p in model.parameters() if id(p) not in counted}
    cache = kv_bytes(model, kv, context, batch, dtype)
    return Memory(
        base=base_bytes(kv is not None) if base is None else base,
        **parts,
        other=sum(rest.values()) * dtype.itemsize,
        cache=cache,
        workspace=workspace_bytes(model, kv, cache, min(chunk or context, context) * batch, batch, dtype),
    )


def kept_bytes(
    scheme: Scheme | None, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, *, only_rows: bool = False
) -> int:
    """Bytes of a weight [out, in], or of a stack [experts, out, in], as it is held once prepared on this CPU.

    only_rows: an embedding that no head shares, which stays in the canonical layout. SchemeError for a misfit.
    """
    if scheme is None:
        return math.prod(shape) * dtype.itemsize
    out, n = shape[-2:]
    own = codec_fields(scheme, (out, n))
    specs = field_specs(scheme, (out, n))
    transforms = sum(math.prod(size) * kind.itemsize for name, (size, kind) in specs.items() if name not in own)
    bare = scheme.replace(transforms=())
    kernel = choose(bare, (out, n), CPU)
    if kernel.canonical or only_rows:
        codec = stored_bytes(bare, (out, n))
    else:
        blocks, rows = divmod(out - 1, BLOCK)  # rows + 1 in the last block: not every field is padded to whole ones
        block = _packed_bytes(bare, 2 * BLOCK, n) - _packed_bytes(bare, BLOCK, n)
        codec = _packed_bytes(bare, rows + 1, n) + blocks * block
    return math.prod(shape[:-2]) * (codec + transforms)


@lru_cache(maxsize=1024)
def _packed_bytes(scheme: Scheme, rows: int, n: int) -> int:
    """Of a layout of so many rows: what a kernel keeps beside the codes (tables as bytes, sums) it knows alone."""
    kernel = choose(scheme, (rows, n), CPU)
    return kernel.prepare(random_weight(scheme, (rows, n), torch.Generator().manual_seed(0))).nbytes


def kv_bytes(model: nn.Module, kv: KVPlan | None, context: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the cache of `batch` rows of `context` tokens; layers with a sliding window hold the window."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    heads, width = _heads(text)
    packed = packed_layers(config) if kv is not None else []
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    total = 0
    for layer, kind in enumerate(kinds):
        if kv is not None and layer in packed:
            total += cache_bytes(kv.format_of(layer), context, batch, heads, width, itemsize=dtype.itemsize)
        elif kind in ("full_attention", "sliding_attention"):
            held = context if kind == "full_attention" else min(context, text.sliding_window)
            total += batch * held * heads * 2 * width * dtype.itemsize
    return total


def workspace_bytes(
    model: nn.Module, kv: KVPlan | None, cache: int, tokens: int, batch: int, dtype: torch.dtype
) -> int:
    """Bytes beside weights and cache at the worst moment: the MLP of one block over `tokens` tokens in one pass, and
    what the cache is copied from.

    In a block: the stream and its norm, gate, act(gate), up and their product in the model's dtype; the norm's float32
    and the input of down in float32, as kernels transform it. A dense cache of one row is copied into the native
    decoder's own (generation.py); others grow by a copy of one layer; pages grow by a sixteenth (kv_pages.py).
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    hidden, inter = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    a_token = dtype.itemsize * (4 * inter + 2 * hidden) + 4 * (inter + 2 * hidden)
    if kv is not None:
        copied = cache // GROWTH + 2 * cache // text.num_hidden_layers
    else:
        copied = cache if batch == 1 else 2 * cache // text.num_hidden_layers
    return tokens * a_token + copied


def longest_context(
    model: nn.Module,
    schemes: Mapping[str, Scheme | None],
    kv: KVPlan | None,
    memories: Iterable[int] = COMMON,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
    base: int | None = None,
) -> dict[int, int]:
    """{bytes of memory: most tokens of context that fit, at most the model's positions; 0 where not one does}."""
    config: Any = model.config
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20
    base = base_bytes(kv is not None) if base is None else base

    def total(context: int) -> int:
        return fixed.base + fixed.weights + _growing(context)

    def _growing(context: int) -> int:
        cache = kv_bytes(model, kv, context, batch, dtype)
        return cache + workspace_bytes(model, kv, cache, min(chunk or context, context) * batch, batch, dtype)

    fixed = memory_of(model, schemes, kv, 1, batch, dtype, chunk=chunk, base=base)
    found = {}
    for memory in memories:
        low, high = 0, most  # total(low) fits, as far as 0 tokens always do
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle) <= memory else (low, middle - 1)
        found[memory] = low
    return found


def _heads(text: Any) -> tuple[int, int]:
    """(kv_heads, head_dim)"""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, width
