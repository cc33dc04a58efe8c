"""Instructions of compiled kernels: the listing of `cuobjdump -sass`, its loops, and what one round of a loop issues.

A round is the shortest way through a loop that leaves out no matrix instruction, dot product or asynchronous copy. So
what is done once a tile, in a branch, does not count; nor does what a branch skips for most weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

MATRIX = {"HMMA", "IMMA"}
DOT = {"IDP"}

# The pipe of 64 lanes a clock for bit operations and sums of integers; names of all generations from sm_80 to sm_90a.
ALU = {"LOP3", "PLOP3", "SHF", "PRMT", "IADD3", "IADD", "VIADD", "LEA", "IABS", "MOV", "CS2R", "P2R", "R2P", "SGXT"}
ALU |= {"BMSK", "ISETP", "SEL", "IMNMX", "VIMNMX", "VIADDMNMX", "FSETP", "FSEL", "FMNMX", "VOTE"}
# The pipe of products: the compiler moves, shifts and adds with IMAD, too. HADD2.F32 is fp16 to fp32.
FMA = {"IMAD", "IDP", "FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "HSET2", "HSETP2", "HMNMX2"}
CONVERSIONS = {"I2F", "I2FP", "F2I", "F2F", "F2FP", "I2I", "FRND"}
LOCAL = {"LDL", "STL"}
ESSENTIAL = MATRIX | DOT | {"LDGSTS"}

_FUNCTION = re.compile(r"^\s*Function : (\S+)$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """name: LDS; modifiers: ".64"; guard: "@!P0" or ""."""

    address: int
    name: str
    modifiers: str
    operands: str
    guard: str

    @property
    def never(self) -> bool:
        """A placeholder for the hardware's sake (`@!PT LDS RZ, [RZ]` before asynchronous copies): it only issues."""
        return self.guard in ("@!PT", "@!UPT")


def functions(sass: str) -> dict[str, list[Instruction]]:
    """Instructions of every function, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in sass.splitlines():
        if start := _FUNCTION.match(line):
            current = found.setdefault(start[1], [])
        elif match := _INSTRUCTION.match(line):
            guard, operands = (match[2] or "").strip(), match[5].strip()
            current.append(Instruction(int(match[1], 16), match[3], match[4], operands, guard))
    return found


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """(first, last) index of each stretch that a branch backwards closes; a branch to itself, behind the end, is none.

    The compiler closes a loop with several branches now and then: they make several stretches with one beginning.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, instruction in enumerate(code):
        target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        if target and int(target[1], 16) < instruction.address:
            found.append((at[int(target[1], 16)], i))
    return found


@dataclass(frozen=True)
class Loop:
    """Counts of one round. by_opcode: name with modifiers, placeholders left out; issue: everything.

    size: instructions of the whole loop. inner: loops inside, of which a round has one round each. way: whether there
    is a way from the loop's beginning to its end that leaves out none of the instructions that must not be.
    """

    issue: int
    size: int
    inner: int
    way: bool
    by_opcode: Counter[str] = field(repr=False)

    def count(self, names: Collection[str]) -> int:
        return sum(n for opcode, n in self.by_opcode.items() if opcode.partition(".")[0] in names)

    @property
    def matrix(self) -> int:
        return self.count(MATRIX)

    @property
    def alu(self) -> int:
        return self.count(ALU)

    @property
    def fma(self) -> int:
        return self.count(FMA)

    @property
    def conversions(self) -> int:
        return self.count(CONVERSIONS)

    @property
    def lds(self) -> int:
        """Reads of shared memory, one to a lane however wide."""
        return self.count({"LDS", "LDSM"})

    def of_width(self, name: str, bits: int) -> int:
        """LDS, LDG or LDGSTS of so many bits. LDSM, LDS.U8 and LDS.U16 are not LDS.32."""
        return sum(
            n for opcode, n in self.by_opcode.items() if opcode.partition(".")[0] == name and bits == _width(opcode)
        )


def _width(opcode: str) -> int:
    """Bits of a load or store a lane."""
    for modifier in opcode.split(".")[1:]:
        if modifier in ("64", "128"):
            return int(modifier)
        if re.fullmatch(r"[US](8|16)", modifier):
            return int(modifier[1:])
    return 32


def hot_loop(code: Sequence[Instruction], matrix: int = 0) -> Loop | None:
    """The loop where a kernel spends its time, None for a kernel without loops.

    That is the smallest one with all matrix instructions that are in loops; without matrix instructions, all dot
    products of bytes; without either, the largest loop that has no other inside. matrix: the smallest loop with so many
    matrix instructions at least, where a kernel has several loops with some.
    """
    stretches = loops(code)
    if not stretches:
        return None
    if matrix:
        number = {s: sum(i.name in MATRIX for i in code[s[0] : s[1] + 1]) for s in stretches}
        enough = [s for s in stretches if number[s] >= matrix]
        return _loop(code, stretches, min(enough, key=_length)) if enough else None
    for wanted in (MATRIX, DOT):
        number = {s: sum(i.name in wanted for i in code[s[0] : s[1] + 1]) for s in stretches}
        if most := max(number.values()):
            best = min((s for s in stretches if number[s] == most), key=_length)
            return _loop(code, stretches, best)
    innermost = [s for s in stretches if not _inside(stretches, s)]
    return _loop(code, stretches, max(innermost, key=_length))


def _length(stretch: tuple[int, int]) -> int:
    return stretch[1] - stretch[0]


def _inside(stretches: list[tuple[int, int]], outer: tuple[int, int]) -> set[int]:
    """Where the loops begin that are inside another one."""
    return {a for a, b in stretches if outer[0] < a and b <= outer[1]}


def _loop(code: Sequence[Instruction], stretches: list[tuple[int, int]], stretch: tuple[int, int]) -> Loop:
    body = code[stretch[0] : stretch[1] + 1]
    way = shortest_round(body)
    by_opcode = Counter(i.name + i.modifiers for i in way or body if not i.never)
    return Loop(len(way or body), len(body), len(_inside(stretches, stretch)), way is not None, by_opcode)


def shortest_round(body: Sequence[Instruction]) -> list[Instruction] | None:
    """The fewest instructions from the first to the last that leave out none of `ESSENTIAL`.

    All of them where none is essential, None where there is no such way. Branches backwards are not taken.
    """
    essential = [i.name in ESSENTIAL for i in body]
    if not any(essential):
        return list(body)
    passed = [0, *accumulate(essential)]  # before instruction i
    at = {instruction.address: i for i, instruction in enumerate(body)}
    before: list[int | None] = [None] * len(body)  # on the way to instruction i, and how long it is
    length = [0] + [len(body) + 1] * (len(body) - 1)
    for i, instruction in enumerate(body[:-1]):
        following = []
        if instruction.name == "BRA" and (target := _TARGET.search(instruction.operands)):
            following.append(at.get(int(target[1], 16), 0))
        if instruction.guard or instruction.name not in ("BRA", "EXIT", "RET"):
            following.append(i + 1)
        for j in following:
            if j > i and passed[j] == passed[i + 1] and length[i] + 1 < length[j]:
                before[j], length[j] = i, length[i] + 1
    if length[-1] > len(body):
        return None
    way: list[int] = []
    here: int | None = len(body) - 1
    while here is not None:
        way.append(here)
        here = before[here]
    return [body[i] for i in reversed(way)]
