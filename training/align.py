"""A warm start for the projection head: what it says of a picture should lie near what the answer says.

A contrastive loss (InfoNCE, van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021) between the
mean of the head's output tokens and the mean embedding of the answer's tokens. It needs features and the
decoder's embedding table only, so a minute of it replaces hundreds of steps through the decoder.
"""

# Shapes: B pairs of a step, D decoder width; G, S, E, K as in modalities.projector

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.modalities.projector import ProjectionHead
from okavango.training.features import VIEWED, view_key
from okavango.training.loop import TrainingSet
from okavango.training.monitor import Monitor
from okavango.training.pairs import Pair, answer_table, find_pairs
from okavango.training.spec import AlignSpec

# Media that are kept in memory: pictures at 16 tokens of 768 channels take a gigabyte.
_MOST_FEATURES = 20_000
_RISE_STEPS = 20


def align(
    head: ProjectionHead,
    modality: str,
    data: TrainingSet,
    embedding: nn.Module,
    spec: AlignSpec,
    seed: int,
    monitor: Monitor,
) -> float | None:
    """Train the head in place; the last loss, or None where there is nothing to tell apart.

    Args:
        data: loads pooled features.
        spec: with its number of steps, see AlignSpec.for_head.
        embedding: the decoder's token embeddings; the head is computed in their precision.
    """
    steps = spec.steps or 0
    pairs = _sample(find_pairs(data.rows, modality), seed)
    names = sorted({pair.answer for pair in pairs})
    if steps == 0 or len(names) < 2:
        because = (
            "it is trained, or this is turned off"
            if pairs and steps == 0
            else "all answers about media are alike"
        )
        because = because if pairs else "the data hold no such media"
        monitor.say(f"No warm start of the {modality} head: {because}.")
        return None
    device = next(head.parameters()).device
    table, common = (tensor.to(device) for tensor in answer_table(names, embedding))
    label = {name: i for i, name in enumerate(names)}
    marks = torch.tensor([label[pair.answer] for pair in pairs], device=device)
    seen = _views([pair.media for pair in pairs], modality, data)
    dtype = next(embedding.parameters()).dtype
    return _fit(head, seen, marks, table, common, dtype, spec, seed, monitor)


def info_nce(seen: Tensor, said: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of [B, D] against [B, D]. Pairs with one label are each other's positives, too."""
    scores = F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T / temperature
    same = (labels[:, None] == labels[None, :]).float()
    wanted = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2


def _sample(pairs: list[Pair], seed: int) -> list[Pair]:
    if len(pairs) <= _MOST_FEATURES:
        return pairs
    chosen = np.random.default_rng([seed, 0]).choice(len(pairs), _MOST_FEATURES, replace=False)
    return [pairs[i] for i in sorted(chosen)]


def _views(media: Sequence[str], modality: str, data: TrainingSet) -> list[list[Tensor]]:
    """[G, S, E] by view and pair: as many views as memory is granted for."""
    views = min(data.views, max(0, _MOST_FEATURES // len(media) - 1)) if modality in VIEWED else 0
    return [
        [data.load(modality, view_key(digest, number)) for digest in media] for number in range(views + 1)
    ]


def _fit(
    head: ProjectionHead,
    features: Sequence[Sequence[Tensor]],
    labels: Tensor,
    table: Tensor,
    common: Tensor,
    dtype: torch.dtype,
    spec: AlignSpec,
    seed: int,
    monitor: Monitor,
) -> float:
    optimizer = torch.optim.AdamW(head.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    chance = np.random.default_rng([seed, 1])
    views, pairs = len(features), len(features[0])
    loss = torch.tensor(math.nan)
    steps = spec.steps or 0
    with monitor.bar("warming the head up", steps) as advance:
        for step in range(steps):
            chosen = torch.from_numpy(chance.permutation(pairs)[: spec.batch_size])
            which = chance.integers(views, size=len(chosen))
            pooled = [features[view][pair] for view, pair in zip(which, chosen, strict=True)]
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * _factor(step, steps)
            # entered anew each step: autocast keeps its copies of the weights until it is left
            with torch.autocast(table.device.type, dtype, enabled=dtype == torch.bfloat16):
                said = head(torch.cat(pooled).to(table.device))
            seen = _means(said.float(), [len(each) for each in pooled]) - common
            chosen = chosen.to(table.device)
            loss = info_nce(seen, table[labels[chosen]], labels[chosen], spec.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            advance(loss=loss.item())
            monitor.check()
    return loss.item()


def _means(said: Tensor, groups: Sequence[int]) -> Tensor:
    """[groups of all media, K, D], of which each medium has so many → [media, D]."""
    counts = torch.tensor(groups, device=said.device)
    owner = torch.repeat_interleave(torch.arange(len(groups), device=said.device), counts)
    sums = torch.zeros(len(groups), said.shape[2], device=said.device).index_add_(0, owner, said.mean(1))
    return sums / counts[:, None]


def _factor(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine down."""
    rise = min(1.0, (step + 1) / _RISE_STEPS)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
