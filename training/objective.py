"""What training minimises."""

# Shapes: L predicted tokens, V vocabulary, D decoder width, B pairs of this process, P width of the shared
#         space

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the assistant's tokens, summed, in nats: logits [L, V], labels [L] → scalar, float32.

    A sum, so that the batches of one step can be divided by the step's count of tokens, whatever each has.

    Args:
        smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def parted_loss(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], rows: int, smoothing: float = 0.0
) -> Tensor:
    """answer_loss of head(hidden), for hidden [L, D], with logits of no more than `rows` at a time.

    Where the vocabulary is large, logits and what is made of them are most of a step's memory. A part's
    gradient is computed beside its loss, so that none of them waits for the backward pass (as in Liger
    Kernel, Hsu et al. 2024). `hidden` alone gets one: the head has to be frozen.
    """
    loss: Tensor = _Parted.apply(hidden, labels, head, rows, smoothing)
    return loss


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        rows: int,
        smoothing: float,
    ) -> Tensor:
        learns = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden.device)
        gradients = []
        for part, chosen in zip(hidden.split(rows), labels.split(rows), strict=True):
            with torch.set_grad_enabled(learns):
                own = part.detach().requires_grad_(learns)
                loss = answer_loss(head(own), chosen, smoothing)
            if learns:
                gradients += torch.autograd.grad(loss, own)
            total += loss.detach()
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def contrastive_loss(media: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021) between unit vectors [B, P] of media and of their texts, over the
    pairs of all processes: open_clip's ClipLoss.

    Every process calls it in each step, with as many pairs as it happens to have, or none; otherwise those
    that have some would wait for ever. Fewer than two in all leave nothing to tell apart: zero.
    """
    from open_clip.loss import ClipLoss

    media, texts = _of_all(media), _of_all(texts)
    if len(media) < 2:
        return (media.sum() + texts.sum()) * 0 + scale * 0
    loss: Tensor = ClipLoss()(media, texts, scale)
    return loss


def _of_all(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks, however many each has. Gradients flow back."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    counts = [
        torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(distributed.get_world_size())
    ]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = F.pad(rows, (0, 0, 0, most - len(rows)))
    found = all_gather(padded)
    return torch.cat([part[: int(count)] for part, count in zip(found, counts, strict=True)])
