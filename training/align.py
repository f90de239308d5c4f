"""A warm start for the projection head: what it says of a picture should lie near what the answer says.

A contrastive loss (InfoNCE, van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021) between the
mean of the head's output tokens and the mean embedding of the answer's tokens. It needs features and the
decoder's embedding table only, so a minute of it replaces hundreds of steps through the decoder.
"""

# Shapes: B pairs of a step, Z all pairs, E tokens a medium, C encoder width, D decoder width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.modalities.projector import ProjectionHead
from okavango.training.collate import Row
from okavango.training.features import view_key
from okavango.training.loop import TrainingSet
from okavango.training.monitor import Monitor
from okavango.training.spec import AlignSpec

# Features that are kept in memory: at 16 tokens of 768 channels, a gigabyte.
_MOST_FEATURES = 20_000
_RISE_STEPS = 20


@dataclass(frozen=True)
class Pair:
    """A medium, and the tokens of the answer that comes after it."""

    media: str
    answer: tuple[int, ...]


def align(
    head: ProjectionHead,
    data: TrainingSet,
    embedding: nn.Module,
    spec: AlignSpec,
    seed: int,
    monitor: Monitor,
) -> float | None:
    """Train the head in place; the last loss, or None where there is nothing to tell apart.

    Args:
        embedding: the decoder's token embeddings; the head is computed in their precision.
    """
    pairs = _sample(find_pairs(data.rows), seed)
    names = sorted({pair.answer for pair in pairs})
    if spec.steps == 0 or len(names) < 2:
        because = "it is turned off" if pairs and spec.steps == 0 else "all answers about media are alike"
        monitor.say(f"No warm start of the head: {because if pairs else 'the data hold no media'}.")
        return None
    device = next(head.parameters()).device
    table, common = (tensor.to(device) for tensor in _answer_table(names, embedding))
    label = {name: i for i, name in enumerate(names)}
    marks = torch.tensor([label[pair.answer] for pair in pairs], device=device)
    seen = _views([pair.media for pair in pairs], data).to(device)
    dtype = next(embedding.parameters()).dtype
    return _fit(head, seen, marks, table, common, dtype, spec, seed, monitor)


def find_pairs(rows: Sequence[Row]) -> list[Pair]:
    """Each medium of the rows with the first answer after it."""
    return [
        Pair(media, _answer_after(row, span.end))
        for row in rows
        for span, media in zip(row.spans, row.media, strict=True)
    ]


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


def _answer_after(row: Row, position: int) -> tuple[int, ...]:
    start = position + int(row.loss[position:].argmax())
    length = int((~row.loss[start:]).argmax()) or len(row.loss) - start
    # without the end of the turn, which every answer has
    return tuple(int(token) for token in row.tokens[start : start + max(length - 1, 1)])


def _answer_table(names: Sequence[tuple[int, ...]], embedding: nn.Module) -> tuple[Tensor, Tensor]:
    """[answers, D]: mean token embeddings, less what all of them have in common; and that, [D]."""
    with torch.no_grad():
        device = next(embedding.parameters()).device
        means = [embedding(torch.tensor(name, device=device)).float().mean(0) for name in names]
    table = torch.stack(means)
    return table - table.mean(0), table.mean(0)


def _views(media: Sequence[str], data: TrainingSet) -> Tensor:
    """[views, Z, E, C]: as many views as memory is granted for."""
    views = min(data.views + 1, max(1, _MOST_FEATURES // len(media)))
    return torch.stack(
        [torch.stack([data.load(view_key(digest, k)) for digest in media]) for k in range(views)]
    )


def _fit(
    head: ProjectionHead,
    features: Tensor,
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
    views, pairs = features.shape[:2]
    loss = torch.tensor(math.nan)
    with monitor.bar("warming the head up", spec.steps) as advance:
        for step in range(spec.steps):
            chosen = torch.from_numpy(chance.permutation(pairs)[: spec.batch_size]).to(table.device)
            which = torch.from_numpy(chance.integers(views, size=len(chosen))).to(table.device)
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * _factor(step, spec.steps)
            # entered anew each step: autocast keeps its copies of the weights until it is left
            with torch.autocast(table.device.type, dtype, enabled=dtype == torch.bfloat16):
                said = head(features[which, chosen])
            seen = said.float().mean(1) - common
            loss = info_nce(seen, table[labels[chosen]], labels[chosen], spec.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            advance(loss=loss.item())
            monitor.check()
    return loss.item()


def _factor(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine down."""
    rise = min(1.0, (step + 1) / _RISE_STEPS)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
