"""Codec `trellis` on a CPU, natively from the canonical layout (csrc/cpu/trellis_decode.h).

Up to MOST_TOKENS rows of x are multiplied while the tiles are decoded, in float32; above that row blocks are decoded
natively and go through torch's matmul. Single rows, for embeddings, are decoded without the others of their tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.native import cpu_module, why_no_cpu_module
from ..quant.scheme import Scheme
from ..quant.tensor import QuantizedTensor
from ..quant.trellis import TrellisScheme
from .base import Packed
from .isa import OnInstructionSet
from .rows import row_blocks

MOST_TOKENS = 8
WIDE_BLOCK_ELEMENTS = 1 << 19


class CpuTrellisKernel(OnInstructionSet):
    name = "cpu_trellis"
    rank = 120
    canonical = True

    def why_not(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if not isinstance(scheme, TrellisScheme):
            return f"runs codec trellis, not {scheme.codec}"
        return why_no_cpu_module()

    def prepare(self, qt: QuantizedTensor) -> Packed:
        return Packed(qt.scheme, (qt.shape[0], qt.shape[1]), {name: qt.fields[name] for name in ("codes", "scale")})

    def unprepare(self, packed: Packed) -> QuantizedTensor:
        return QuantizedTensor(packed.scheme, packed.shape, dict(packed.tensors))

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        z = x.float().contiguous()
        y = torch.empty(z.shape[0], packed.shape[0])
        if z.shape[0] <= MOST_TOKENS:
            cpu_module().trellis_linear(
                *self._weight(packed), z.data_ptr(), z.shape[0], y.data_ptr(), torch.get_num_threads()
            )
        else:
            blocks = list(row_blocks(*packed.shape, WIDE_BLOCK_ELEMENTS))
            buffer = torch.empty(blocks[0][1], packed.shape[1])
            for start, stop in blocks:
                w = buffer[: stop - start]
                self._decode(packed, torch.arange(start, stop), w)
                torch.mm(z, w.T, out=y[:, start:stop])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def rows(self, packed: Packed, index: Tensor) -> Tensor:
        out = torch.empty(index.shape[0], packed.shape[1])
        self._decode(packed, index.contiguous(), out)
        return out

    def _decode(self, packed: Packed, index: Tensor, out: Tensor) -> None:
        cpu_module().trellis_decode(
            *self._weight(packed), index.data_ptr(), index.shape[0], out.data_ptr(), torch.get_num_threads()
        )

    def _weight(self, packed: Packed) -> tuple[int, ...]:
        """What every native call begins with: instruction set, addresses, sizes, rate and window."""
        scheme = packed.scheme
        if not isinstance(scheme, TrellisScheme):
            raise TypeError(f"cpu_trellis runs codec trellis, not {scheme}")
        if packed.handle is None:
            packed.handle = packed.tensors["scale"].float()
        addresses = (packed.tensors["codes"].data_ptr(), packed.handle.data_ptr())
        return (self.resolve_isa(), *addresses, *packed.shape, scheme.row_bits, scheme.window)


KERNEL = CpuTrellisKernel()
