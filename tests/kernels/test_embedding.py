"""QuantEmbedding against nn.Embedding over the decoded table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitpalette.kernels.embedding import QuantEmbedding
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor

SCHEMES = [
    {"codec": "int", "bits": 4, "group_size": 32},
    {"codec": "int", "bits": 8, "symmetric": False},
    {"codec": "int", "bits": 5, "per_input_channel": True},
    {"codec": "int", "bits": 4, "transforms": ["rotate"]},
    {"codec": "lut"},
]


@pytest.fixture(params=SCHEMES, ids=lambda values: str(Scheme.from_dict(values)))
def table(request: pytest.FixtureRequest) -> QuantizedTensor:
    torch.manual_seed(5)
    return quantize_tensor(torch.randn(37, 72), Scheme.from_dict(request.param))


@pytest.mark.parametrize("ids", [[[0, 36, 36], [1, 2, 3]], [], 7])
def test_rows_are_those_of_the_table(table: QuantizedTensor, ids: list) -> None:
    index = torch.tensor(ids, dtype=torch.int64)
    embed = QuantEmbedding.from_tensor(table, padding_idx=3)
    rows = embed(index)
    assert rows.shape == (*index.shape, 72)
    assert torch.allclose(rows, nn.functional.embedding(index, table.dequantize()), atol=1e-6)
    assert torch.allclose(embed(index.int()), rows)


def test_serving_a_head_gives_the_same_rows(table: QuantizedTensor) -> None:
    index = torch.tensor([4, 36, 0])
    embed = QuantEmbedding.from_tensor(table)
    rows = embed(index)
    embed.serve_linear()
    assert torch.equal(embed(index), rows)


def test_dtype_follows_the_model_and_fields_do_not(table: QuantizedTensor) -> None:
    embed = QuantEmbedding.from_tensor(table, dtype=torch.bfloat16)
    assert embed(torch.tensor([1])).dtype == torch.bfloat16
    before = copy.deepcopy(embed.state_dict())
    embed.half()
    assert embed.dtype == torch.float16 and embed(torch.tensor([1])).dtype == torch.float16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in embed.state_dict().items())
    assert copy.deepcopy(embed).dtype == torch.float16


def test_embed_scale_is_rounded_to_the_dtype_as_gemma_does(table: QuantizedTensor) -> None:
    embed = QuantEmbedding.from_tensor(table, embed_scale=72**0.5, dtype=torch.bfloat16)
    plain = QuantEmbedding.from_tensor(table, dtype=torch.bfloat16)
    ids = torch.tensor([2, 3])
    assert torch.equal(embed(ids), plain(ids) * torch.tensor(72**0.5).to(torch.bfloat16))


@pytest.mark.parametrize("bad", [-1, 37])
def test_ids_out_of_range(table: QuantizedTensor, bad: int) -> None:
    with pytest.raises(IndexError, match="rows 0 to 36"):
        QuantEmbedding.from_tensor(table)(torch.tensor([0, bad]))
