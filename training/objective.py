"""What training minimises."""

# Shapes: L predicted tokens, V vocabulary

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the assistant's tokens, summed, in nats: logits [L, V], labels [L] → scalar, float32.

    A sum, so that the batches of one step can be divided by the step's count of tokens, whatever each has.

    Args:
        smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
