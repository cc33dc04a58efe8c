"""What a compiled kernel must be like: the gate of bench/static.py.

Budgets of instructions per weight. A multiprocessor of an H100 issues 128 lanes a clock and has 64 lanes for bit
operations (ALU), at 1.755 GHz on 132 of them 29.7e12 and 14.8e12 a second. Memory brings 3.0e12 bytes, 8 / b weights
each. A decoder that takes more instructions than there are for a weight cannot keep the memory busy.

- int, lut, float: exactly that, at the bits of a code: ALU 0.617 b, issue 1.24 b (4 bits: 2.47 and 4.9).
- trellis: no decoder of it keeps up with the memory at 2 bits, so what counts is the decoder: its shortest known
  sequence of instructions, without loads, addresses, barriers and products, which are another 0.2 to 0.5; taken as 0.5.
  Window, product, sum of bytes (IDP), a half of a subtraction in pairs: ALU 2.25 and 4.6 in all. With int8
  activations the sum of bytes is the product with them: ALU 1.74 and 3.6, and one IDP more for each vector after the
  first.

Both with 25 % on top. Only the kernels that wait for the memory have a budget: GEMMs of 8 tokens, and gemv_i8.
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
OVERHEAD = 0.5

REGISTERS = 65536
REGISTER_UNIT = 8  # of a thread
"""Registers of a multiprocessor, and in which units they are given out; the same from sm_80 to sm_90a."""


@dataclass(frozen=True)
class Budget:
    """Instructions per weight and lane, margin included."""

    alu: float
    issue: float


_DECODERS = {
    "gemm": Budget((2.25 + OVERHEAD) * MARGIN, (4.6 + OVERHEAD) * MARGIN),
    "gemv_i8": Budget((1.74 + OVERHEAD) * MARGIN, (3.6 + OVERHEAD) * MARGIN),
}
"""Of trellis, by family of kernels; gemv_i8 with one vector."""


def budget(kernel: Kernel) -> Budget | None:
    """What a kernel may take, None where it has no budget."""
    if kernel.family == "gemv_i8":
        one = _DECODERS["gemv_i8"]
        return Budget(one.alu, one.issue + (kernel.tokens - 1) * MARGIN)
    if kernel.family not in ("gemm", "gemm_w4a8") or kernel.tokens != 8:
        return None
    if kernel.format == "trellis":
        return _DECODERS["gemm"]
    weights = MEMORY_RATE * 8 / kernel.bits  # a second
    return Budget(ALU_RATE / weights * MARGIN, ISSUE_RATE / weights * MARGIN)


def violations(compiled: Compiled) -> list[str]:
    """A line for each thing that is wrong, with the number and where to look."""
    where = f"{compiled.kernel.name} {compiled.arch}"
    return [f"{where}: {text}" for text in _violations(compiled)]


def _violations(compiled: Compiled) -> Iterator[str]:
    kernel, loop = compiled.kernel, hot_loop(compiled.code)
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
    if loop.matrix != kernel.matrix:
        yield f"{loop.matrix} matrix instructions in the main loop; unrolled they are {kernel.matrix}"
    copies, wide = loop.count({"LDGSTS"}), loop.of_width("LDGSTS", 128)
    if wide == 0 or wide != copies:
        yield f"{wide} of {copies} asynchronous copies in the main loop have 128 bits; all must, and one at least"
    if kernel.family == "gemv_i8":
        return
    if kernel.family == "gemm" and (conversions := loop.count(CONVERSIONS & {"I2F", "I2FP"})):
        yield f"{conversions} conversions of integers (I2F) in the main loop; codes become fp16 without"
    if kernel.bits in (4, 8):
        need = kernel.row_tiles * kernel.bits // 4
        if (found := loop.of_width("LDS", 128)) < need:
            yield f"{found} LDS.128 in the main loop; the weights alone are {need}"
    elif kernel.bits in (2, 3):
        # columns of tokens take LDS.64, too, each at least once
        need = kernel.row_tiles + (4 * kernel.tokens // 8 if kernel.family == "gemm" else 0)
        if (found := loop.of_width("LDS", 64)) < need:
            yield f"{found} LDS.64 in the main loop; weights and tokens are {need} at least"
