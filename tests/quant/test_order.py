"""Transform `order`."""

from __future__ import annotations

import pytest
import torch

from bitpalette.quant.order import TRANSFORM, index_bits, pack_order, unpack_order
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.stats import Stats


@pytest.mark.parametrize("n", [1, 2, 3, 17, 576, 577, 1536])
def test_packing(n: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    packed = pack_order(order)
    assert packed.shape == (-(-n * index_bits(n) // 8),)
    assert torch.equal(unpack_order(packed, n), order)


def test_golden_bytes() -> None:
    # 5 inputs, 3 bits an index, lowest first: 4 2 0 1 3 = 100 | 010 | 000 | 001 | 011
    assert pack_order(torch.tensor([4, 2, 0, 1, 3])).tolist() == [0b00_010_100, 0b0_011_001_0]


def test_what_is_no_permutation() -> None:
    with pytest.raises(SchemeError, match="5 inputs is no permutation: damaged file"):
        unpack_order(torch.tensor([0b00_010_100, 0b0_011_011_0], dtype=torch.uint8), 5)


def test_most_energy_first() -> None:
    energy = torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0])
    hessian = torch.diag(energy)
    hessian[0, 4] = hessian[4, 0] = 0.5
    stats = Stats(hessian, torch.arange(5.0), 7)
    w, scheme = torch.arange(10.0).view(2, 5), Scheme.from_dict({"codec": "int"})
    fields = TRANSFORM.choose(w, stats, 0, scheme)
    assert unpack_order(fields["order"], 5).tolist() == [1, 3, 4, 0, 2]  # equal ones as they were
    after = TRANSFORM.apply_stats(stats, fields)
    assert after.hessian.diagonal().tolist() == [5, 5, 2, 1, 0] and float(after.hessian[2, 3]) == 0.5
    assert after.absmean.tolist() == [1, 3, 4, 0, 2]
    applied = TRANSFORM.apply_weight(w, fields)
    assert applied[0].tolist() == [1, 3, 4, 0, 2] and torch.equal(TRANSFORM.undo_weight(applied, fields), w)
    x = torch.randn(3, 2, 5)
    assert torch.allclose(TRANSFORM.apply_input(x, fields) @ applied.T, x @ w.T)
    assert unpack_order(TRANSFORM.choose(w, None, 0, scheme)["order"], 5).tolist() == [0, 1, 2, 3, 4]
