"""Cases of bench/static_triton.py: the kernels of the KV cache, as they are launched on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bitpalette.kernels.kv_triton import BLOCK_M, WARPS, launch_for, padded_width, power_of_two
from bitpalette.kernels.triton_device.kv_attention import attention_kernel
from bitpalette.kernels.triton_device.kv_combine import combine_kernel
from bitpalette.kernels.triton_device.kv_encode import append_kernel, rotate_kernel
from bitpalette.quant.hartley import odd_part

KV_HEADS = 8
PAGES = 512
"""Of a row: 32 768 tokens."""

SHAPES = ((64, 3), (80, 4), (128, 4), (256, 8))
"""(head_dim, query rows of a kv head)."""

BITS = ((4, 4), (2, 2), (3, 3), (8, 8), (4, 2), (3, 2))
KEYS = {2: "*i16", 3: "*i16", 4: "*i32", 8: "*i32"}
VALUES = {2: "*u8", 3: "*u8", 4: "*i16", 8: "*i16"}
WRITTEN = {2: "*u8", 3: "*u8", 4: "*i16", 8: "*i32"}


def kv_cases(processors: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `static_triton.Case`."""
    for bits_k, bits_v in BITS:
        for head_dim, rows in SHAPES:
            dtypes = ("fp16", "bf16", "fp32") if (bits_k, bits_v) == (4, 4) else ("bf16",)
            if head_dim == 256:  # a float32 model's 256 channels are known to spill 8 bytes, outside of all loops
                dtypes = tuple(dtype for dtype in dtypes if dtype != "fp32")
            for dtype in dtypes:
                yield _attention(bits_k, bits_v, head_dim, rows, dtype, processors)
    for head_dim in (80, 128, 256):
        types = {"parts": "*fp32", "most": "*fp32", "sum": "*fp32", "sink_logits": "*fp32", "y": "*fp32"}
        types |= dict.fromkeys(("kv_heads", "rows", "tokens", "splits"), "i32")
        constants: dict[str, Any] = {"DV": head_dim, "BLOCK": power_of_two(head_dim)}
        yield _plain(f"kv combine D={head_dim}", combine_kernel, types, constants, 1)
        vectors = {"x": "*bf16", "mean": "*fp32", "VECTORS": "i32", "heads": "i32", "factor": "fp32"}
        vectors |= {"token_stride": "i32", "head_stride": "i32"}
        odd, log2 = odd_part(head_dim)
        if odd > 1:
            vectors["matrix"] = "*fp32"
        width = power_of_two(head_dim)
        blocks = {"D": head_dim, "WIDTH": width, "ODD": odd, "LOG2": log2, "BLOCK": 32 * WARPS * 8 // width}
        yield _plain(f"kv rotate D={head_dim}", rotate_kernel, vectors | {"y": "*fp32"}, blocks, WARPS, fusion=False)
        for bits in (2, 3, 4, 8):
            types = vectors | {"slots": "*i64", "codes": WRITTEN[bits], "gain": "*fp16", "SLOTS": "i32"}
            types |= {"step": "fp32", "most_gain": "fp32"}
            constants = blocks | {"BITS": bits, "UNBIASED": True, "ROTATE": True}
            yield _plain(f"kv append {bits} bits D={head_dim}", append_kernel, types, constants, WARPS, fusion=False)


def _plain(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, **more: Any) -> Any:
    return {
        "name": name,
        "kernel": kernel,
        "types": types,
        "constants": constants,
        "warps": warps,
        "matrix": False,
        "unaligned": _numbers(types),
        **more,
    }


def _numbers(types: dict[str, str]) -> tuple[str, ...]:
    """Arguments that are no multiples of 16: all numbers but strides."""
    return tuple(name for name, kind in types.items() if not kind.startswith("*") and "stride" not in name)


def _attention(bits_k: int, bits_v: int, head_dim: int, rows: int, dtype: str, processors: int) -> dict[str, Any]:
    itemsize = 4 if dtype == "fp32" else 2
    launch = launch_for(1, KV_HEADS, rows, PAGES, head_dim, processors, itemsize, max(bits_k, bits_v))
    types = {"q": "*fp32", "k_codes": KEYS[bits_k], "v_codes": VALUES[bits_v], "k_gain": "*fp16"}
    types |= {"v_gain": "*fp16", "table": "*i32", "page_lengths": "*i32"}
    if bits_k == 3:
        types["k_high"] = "*u8"
    aligned = []
    for part in ("sink", "window", "fresh"):
        types |= {f"{part}_{side}": f"*{dtype}" for side in "kv"}
        types |= {f"{part}_lengths": "*i32", f"{part}_first": "*i32", f"{part}_slots": "i32"}
        strides = [f"{part}_{side}_{axis}" for side in "kv" for axis in ("row", "token", "head")]
        types |= dict.fromkeys(strides, "i32")
        aligned += strides
    types |= {"out": "*fp32", "most": "*fp32", "sum": "*fp32", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("kv_heads", "rows", "tokens", "table_row", "sliding_window"), "i32")
    constants = {
        "D": head_dim,
        "DV": head_dim,
        "BITS_K": bits_k,
        "BITS_V": bits_v,
        "HAS_SOFTCAP": False,
        "BLOCK_M": BLOCK_M,
        "WIDTH_K": padded_width(head_dim),
        "WIDTH_V": padded_width(head_dim),
        "BLOCK_T": launch.block_t,
        "STAGES": launch.stages,
    }
    return {
        "name": f"kv attention k{bits_k}v{bits_v} D={head_dim} rows={rows} {dtype}",
        "kernel": attention_kernel,
        "types": types,
        "constants": constants,
        "warps": launch.warps,
        "stages": launch.stages,
        "unaligned": tuple(name for name in _numbers(types) if name not in aligned),
        # keys and values of a page
        "weights": 2 * 64 * head_dim / (32 * launch.warps),
    }
