"""A kernel in native code: which instruction set it runs with, decided once."""

from __future__ import annotations

from ..quant.native import chosen_isa, isa_index


class OnInstructionSet:
    """Base of the kernels in csrc/cpu."""

    def __init__(self, isa: str | None = None) -> None:
        """isa: the instruction set to run with; None: the fastest, or what BITPALETTE_CPU_ISA says when first used."""
        self._isa = isa
        self._isa_index: int | None = None

    def resolve_isa(self) -> int:
        """The number of the instruction set. NativeError where this machine lacks it."""
        if self._isa_index is None:
            self._isa_index = isa_index(self._isa or chosen_isa())
        return self._isa_index
