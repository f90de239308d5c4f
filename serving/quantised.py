"""Weights in eight bits, one scale a row. A step on a CPU mostly waits for weights: now for half as many.

Symmetric, to nearest, nothing calibrated: what LLM.int8() calls vector-wise (Dettmers et al. 2022), for the
weights alone. What is computed is what the engine's dtype makes of the weights' rounded values; adapters,
embeddings, keys and values stay as they are.
"""

# Shapes: N outputs, K inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """values [N, K] in int8; scales [N] in float32."""

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        weight = weight.detach().float()
        scales = weight.abs().amax(-1) / LARGEST
        scales[scales == 0] = 1
        return cls((weight / scales[:, None]).round().to(torch.int8), scales)

    def restore(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K] that are computed with."""
        return (self.values.float() * self.scales[:, None]).to(dtype)


Quantised = dict[nn.Module, Int8]


@torch.no_grad()
def quantise(decoder: PreTrainedModel) -> Quantised:
    """Give every linear layer the weights that eight bits leave of its own, the output layer's included.

    A decoder whose output layer is its embedding has two matrices afterwards: embeddings are looked up, not
    multiplied, and stay.
    """
    found: Quantised = {}
    embeddings = decoder.get_input_embeddings().weight
    for module in decoder.modules():
        if not isinstance(module, nn.Linear):
            continue
        found[module] = int8 = Int8.of(module.weight)
        rounded = int8.restore(module.weight.dtype)
        if module.weight is embeddings:
            module.weight = nn.Parameter(rounded, requires_grad=False)
        else:
            module.weight.data = rounded
    return found
