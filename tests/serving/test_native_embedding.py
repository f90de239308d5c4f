"""Looking embeddings up in packed weights gives what is in the weights."""

from __future__ import annotations

import pytest
import torch

from okavango.serving.native.embedding import PackedEmbedding
from okavango.serving.native.packing import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_has_its_own_embedding(dtype):
    weights = torch.randn(37, 32).to(dtype)  # three panels, the last not full
    embedding = PackedEmbedding(pack(weights, dtype))
    assert embedding(torch.arange(37)).equal(weights)
    ids = torch.tensor([[36, 0], [5, 5]])
    assert embedding(ids).equal(weights[ids])
