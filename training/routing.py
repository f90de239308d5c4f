"""Mixtures of experts: what a step's routers chose, and the loss that keeps tokens spread over the experts.

Routers are frozen, but what they see changes with the layers before them: without that loss a run may crowd
its tokens onto a few experts, which serving then waits for. Decoders that balance otherwise, as DeepSeek-V3
does by a bias, have no such loss.
"""

# Shapes: T tokens of a batch, E experts of a layer

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

RouterLogits = Sequence[Tensor]
"""Of each layer that routes: [T, E]."""


@dataclass(frozen=True)
class Routing:
    """How a decoder routes.

    Attributes:
        experts: E.
        chosen: experts a token.
        weight: of the loss, as the decoder was made with.
        loss_of: transformers' load_balancing_loss_func (Fedus et al. 2021, equations 4 to 6) of that decoder.
    """

    experts: int
    chosen: int
    weight: float
    loss_of: Callable[..., Tensor]

    def loss(self, logits: RouterLogits, own: Tensor) -> Tensor:
        """1 times `chosen` where all experts get the same share, more where they do not. `own` [T]: which
        tokens are rows' own, and no padding."""
        return self.loss_of(tuple(logits), self.experts, self.chosen, own[None].float())

    def busiest(self, logits: RouterLogits, own: Tensor) -> float:
        """The tokens of the busiest expert of any layer, over what it would have if all had the same."""
        counts = [
            torch.bincount(each[own].topk(self.chosen).indices.flatten(), minlength=self.experts)
            for each in logits
        ]
        even = int(own.sum()) * self.chosen / self.experts
        return max(int(count.max()) for count in counts) / even


def routing_of(decoder: PreTrainedModel) -> Routing | None:
    """How a decoder routes; None for one that does not, or balances in another way."""
    config: Any = decoder.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    loss_of = getattr(sys.modules[type(decoder).__module__], "load_balancing_loss_func", None)
    if weight is None or loss_of is None:
        return None
    return Routing(config.num_experts, config.num_experts_per_tok, weight, loss_of)
