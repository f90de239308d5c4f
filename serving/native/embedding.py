"""Embeddings of a decoder whose output layer is its embedding: looked up in what is packed for that layer.

The matrix would otherwise lie in memory twice, a tenth or more of a small decoder's weights.
"""

# Shapes: V vocabulary, D decoder width

from __future__ import annotations

import torch
from torch import Tensor, nn

from okavango.serving.native.packing import LANES


class PackedEmbedding(nn.Module):
    """`packed` [⌈V / 16⌉, D / PAIR, 16, PAIR], as packing.pack makes it of [V, D]."""

    def __init__(self, packed: Tensor) -> None:
        super().__init__()
        self._dtype = packed.dtype
        self._words = packed.view(torch.int32)[..., 0]  # what is beside each other takes four bytes

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids → embeddings [*ids.shape, D]."""
        return self._words[ids // LANES, :, ids % LANES].view(self._dtype)
