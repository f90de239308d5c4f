"""One process of several that share a contrastive loss: here a started process finds it by its name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

from okavango.training.objective import contrastive_loss


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Directions of media and of their texts, each (count, 8), drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    media, texts = (torch.randn(count, 8, generator=generator) for _ in range(2))
    return F.normalize(media, dim=-1), F.normalize(texts, dim=-1)


def compute_share(rank: int, counts: list[int], folder: str, results: Any) -> None:
    """Puts (rank, loss, gradient of its media) of the process that has `counts[rank]` pairs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(counts)
    )
    media, texts = pairs(counts[rank], rank)
    media.requires_grad_()
    loss = contrastive_loss(media, texts, torch.tensor(5.0))
    loss.backward()
    results.put((rank, loss.item(), None if media.grad is None else media.grad.tolist()))
    distributed.destroy_process_group()
