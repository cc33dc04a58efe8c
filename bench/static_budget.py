"""What a compiled kernel must be like: the gate of bench/static.py.

Budgets are of instructions per weight and lane in one round of the main loop (static_sass.py), bit operations and all.
A multiprocessor of an H100 issues 128 lanes a clock and has 64 lanes for bit operations (ALU), at 1.755 GHz on 132 of
them 29.7e12 and 14.8e12 a second. Memory brings 3.0e12 bytes a second, 8 / b weights each.

int, lut, float: a decoder that takes more instructions than there are for a weight cannot keep the memory busy. That is
the budget at the bits of a code: ALU 0.617 b, issue 1.24 b (4 bits: 2.47 and 4.9).

trellis: no decoder of it keeps up with the memory at 2 bits, so its budget is its decoder: the shortest sequence of
instructions, counted in a kernel of nothing else without its loads, and 0.5 for addresses, loads and copies. `_TRELLIS`
has them.

kv_attention: as int, with the mean of the bits of keys and values; a weight is an element of a key or value. What a
score costs (softmax, gains) is in it, and weighs twice as much at head_dim 64 as at 128.

All with 25 % on top. Only the kernels that wait for the memory have a budget: GEMMs of 8 tokens, gemv_i8, and attention
of up to 8 queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from static_compile import Compiled
from static_kernels import Kernel
from static_sass import CONVERSIONS, LOCAL, Loop, hot_loop

ALU_RATE = 14.8e12
ISSUE_RATE = 29.7e12
MEMORY_RATE = 3.0e12
MARGIN = 1.25

REGISTERS = 65536
REGISTER_UNIT = 8  # of a thread
"""Registers of a multiprocessor, and in which units they are given out; the same from sm_80 to sm_90a."""


@dataclass(frozen=True)
class Budget:
    """Instructions per weight and lane."""

    alu: float
    issue: float


_TRELLIS = {
    # window, product, sum of its bytes (IDP), half of packing and subtracting a pair
    "decoder": Budget(2.25, 4.6),
    # with int8 activations the sum of bytes is the product with them
    "decoder of gemv_i8": Budget(1.74, 3.6),
    "a vector of gemv_i8 more": Budget(0, 1),  # IDP
    "overhead": Budget(0.5, 0.5),
    # bf16 rounds levels beyond 256: two subtractions and a conversion for a pair where fp16 packs and subtracts
    "bf16": Budget(0, 0.5),
    # a rate known at run time: three addresses are summed for eight weights
    "any rate": Budget(3 / 8, 3 / 8),
}


def _trellis(kernel: Kernel) -> Budget:
    parts = [("decoder of gemv_i8" if kernel.family == "gemv_i8" else "decoder", 1), ("overhead", 1)]
    parts.append(("a vector of gemv_i8 more", kernel.tokens - 1 if kernel.family == "gemv_i8" else 0))
    parts += [("bf16", kernel.type == "bf16"), ("any rate", kernel.bits == 0)]
    alu = sum(_TRELLIS[name].alu * times for name, times in parts)
    return Budget(alu * MARGIN, sum(_TRELLIS[name].issue * times for name, times in parts) * MARGIN)


def budget(kernel: Kernel) -> Budget | None:
    """What a kernel may take, None where it has no budget."""
    few = kernel.family in ("gemm", "gemm_w4a8") and kernel.tokens == 8
    if not few and kernel.family not in ("gemv_i8", "kv_attention"):
        return None
    if kernel.family == "kv_attention" and kernel.weights == 0:
        return None
    if kernel.format == "trellis":
        return _trellis(kernel)
    weights = MEMORY_RATE * 8 / kernel.bits  # a second
    return Budget(ALU_RATE / weights * MARGIN, ISSUE_RATE / weights * MARGIN)


def main_loop(compiled: Compiled) -> Loop | None:
    """Of attention over the cache: that over pages, of three loops with matrix instructions; of others the hot loop."""
    kernel = compiled.kernel
    return hot_loop(compiled.code, kernel.matrix if kernel.family == "kv_attention" else 0)


def violations(compiled: Compiled) -> list[str]:
    """A line for each thing that is wrong, with the number and where to look."""
    where = f"{compiled.kernel.name} {compiled.arch}"
    return [f"{where}: {text}" for text in _violations(compiled)]


def _violations(compiled: Compiled) -> Iterator[str]:
    kernel, loop = compiled.kernel, main_loop(compiled)
    if compiled.spill or compiled.stack:
        yield f"{compiled.spill} bytes spilled, {compiled.stack} bytes of stack; fewer registers must be live"
    if local := sum(i.name in LOCAL for i in compiled.code):
        yield f"{local} loads and stores of local memory; an array's index is not known at compile time, or it spills"
    taken = math.ceil(compiled.registers / REGISTER_UNIT) * REGISTER_UNIT * compiled.threads * compiled.blocks
    if taken > REGISTERS:
        yield (
            f"{compiled.registers} registers x {compiled.threads} threads x {compiled.blocks} blocks are {taken}; "
            f"a multiprocessor has {REGISTERS}: it cannot hold the blocks that its launch bounds promise"
        )
    if kernel.weights == 0:
        return
    if loop is None:
        yield "no loop at all; the main loop was expected"
        return
    yield from _missing(kernel, loop)
    if limit := budget(kernel):
        for name, count, most in (("ALU", loop.alu, limit.alu), ("issued", loop.issue, limit.issue)):
            if not count / kernel.weights <= most:
                yield f"{count / kernel.weights:.2f} {name} instructions a weight; the budget is {most:.2f}"


def _missing(kernel: Kernel, loop: Loop) -> Iterator[str]:
    """What the main loop of a GEMM or of gemv_i8 must have, and must not."""
    if not loop.way:
        yield "there is no way through the main loop with all products and copies, so its instructions are not counted"
    if loop.matrix != kernel.matrix:
        yield f"{loop.matrix} matrix instructions in the main loop; unrolled they are {kernel.matrix}"
    copies, wide = loop.count({"LDGSTS"}), loop.of_width("LDGSTS", 128)
    if wide == 0 or wide != copies:
        yield f"{wide} of {copies} asynchronous copies in the main loop have 128 bits; all must, and one at least"
    if kernel.family == "gemv_i8":
        return
    if kernel.family == "gemm" and (conversions := loop.count(CONVERSIONS & {"I2F", "I2FP"})):
        yield f"{conversions} conversions of integers (I2F) in the main loop; codes become fp16 without"
    if kernel.format == "trellis":
        return
    if kernel.bits in (4, 8):
        need = kernel.row_tiles * int(kernel.bits) // 4
        if (found := loop.of_width("LDS", 128)) < need:
            yield f"{found} LDS.128 in the main loop; the weights alone are {need}"
    elif kernel.bits in (2, 3):
        # columns of tokens take LDS.64, too, each at least once
        need = kernel.row_tiles + (4 * kernel.tokens // 8 if kernel.family == "gemm" else 0)
        if (found := loop.of_width("LDS", 64)) < need:
            yield f"{found} LDS.64 in the main loop; weights and tokens are {need} at least"
