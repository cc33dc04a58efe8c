"""Which kernel serves a cache, and that one which cannot says why."""

from __future__ import annotations

import pytest
import torch

from bitpalette.kernels.kv_kernel import FORCE_VARIABLE, choose
from bitpalette.quant.kv_format import KVError, KVFormat
from bitpalette.quant.native import why_no_cpu_module

CPU = torch.device("cpu")


@pytest.mark.skipif(why_no_cpu_module() is not None, reason="the native module is not built")
def test_native_code_serves_what_it_has_and_the_reference_the_rest() -> None:
    kernel = choose(KVFormat(4, 2), 128, 128, CPU)
    assert kernel is not None and kernel.name == "cpu"
    assert choose(KVFormat(16, 4), 128, 128, CPU) is None
    assert choose(KVFormat(4, 2), 128, 128, torch.device("meta")) is None


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert choose(KVFormat(4, 2), 128, 128, CPU) is None
    monkeypatch.setenv(FORCE_VARIABLE, "gpu")
    with pytest.raises(KVError, match=r"gpu names no kernel of the cache; there are \['cpu'.*'reference'\]"):
        choose(KVFormat(4, 2), 128, 128, CPU)
    monkeypatch.setenv(FORCE_VARIABLE, "cpu")
    with pytest.raises(KVError, match=r"cannot serve k16v4.*: native code has keys of .* bits, not 16; unset"):
        choose(KVFormat(16, 4), 128, 128, CPU)
    with pytest.raises(KVError, match="it runs on cpu"):
        choose(KVFormat(4, 4), 128, 128, torch.device("meta"))
