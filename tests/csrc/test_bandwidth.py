"""The read loops: that they touch every word, on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitpalette.quant.native import available_isas, cpu_module, isa_index

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", [0, 7, 8, 255, 256, 4096, 4104, 100_003])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_word_is_read(isa: str, size: int, threads: int) -> None:
    data = torch.randint(0, 256, (size + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    for start in (0, 3):  # not aligned as well
        words = np.frombuffer(data[start : start + size // 8 * 8].numpy().tobytes(), np.uint64)
        expected = int(np.bitwise_xor.reduce(words)) if len(words) else 0
        assert cpu_module().read_bytes(isa_index(isa), data.data_ptr() + start, size, threads) == expected


def test_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        cpu_module().read_bytes(0, 0, -1, 1)
    with pytest.raises(ValueError, match="no instruction set 99"):
        cpu_module().read_bytes(99, 0, 0, 1)
