"""The joint objective: a contrastive loss beside the generative one, and decoders that now and then go
without media. See modalities.embedding for the space that it trains.
"""

# Shapes: M embeddings of a medium, D decoder width

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from okavango.modalities.embedding import EmbeddingHead
from okavango.training.collate import Row
from okavango.training.model import Made
from okavango.training.objective import contrastive_loss
from okavango.training.pairs import answer_table, find_pairs


def set_common(space: EmbeddingHead, rows: Sequence[Row], embedding: nn.Module) -> None:
    """Tell the space what the answers about media have in common; the same for the same rows."""
    answers = {pair.answer for name in space.spec.modalities for pair in find_pairs(rows, name)}
    space.common.copy_(answer_table(sorted(answers), embedding)[1])


def joint_loss(space: EmbeddingHead, made: Made, rows: Sequence[Row], embedding: nn.Module) -> Tensor:
    """The contrastive loss between the media of these rows and the first answer after each, summed over
    modalities. Every process calls it in each step, whatever its rows hold."""
    total = space.log_scale * 0
    for name in space.spec.modalities:
        pairs = find_pairs(rows, name)
        empty = space.text.weight[:0]  # no rows, but of the space, so that a gradient can flow
        media = space.media_of(name, made[name]) if pairs else empty @ space.text.weight.T
        said = space.texts([_embedded(pair.answer, embedding) for pair in pairs]) if pairs else media
        total = total + contrastive_loss(media, said, space.scale)
    return total


def without_some(made: Made, share: float, seed: int, step: int) -> Made:
    """With zeros in place of some media, drawn by seed and step alone."""
    if not share:
        return made
    chance = random.Random(f"modality dropout {seed}/{step}")
    return {
        name: [vectors * 0 if chance.random() < share else vectors for vectors in media]
        for name, media in sorted(made.items())
    }


def recall_at_1(left: Tensor, right: Tensor, labels: Sequence[object]) -> float:
    """The share of unit vectors `left` whose nearest of `right` carries the same label."""
    nearest = (left @ right.T).argmax(1).tolist()
    return sum(labels[i] == labels[k] for i, k in enumerate(nearest)) / len(labels)


@torch.no_grad()
def retrieval(
    space: EmbeddingHead, batches: Iterable[tuple[Made, Sequence[Row]]], embedding: nn.Module
) -> dict[str, float]:
    """R@1 over held-out pairs, each medium and answer once: of answers by media, and of media by answers."""
    media: dict[str, list[Tensor]] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    seen: set[tuple[str, str]] = set()
    for made, rows in batches:
        for name in space.spec.modalities:
            for pair, vectors in zip(find_pairs(rows, name), made.get(name, ()), strict=True):
                if (name, pair.media) not in seen:
                    seen.add((name, pair.media))
                    media.setdefault(name, []).append(space.media_of(name, [vectors])[0])
                    answers.setdefault(name, []).append(pair.answer)
    scores: dict[str, list[float]] = {"retrieval_r1_text": [], "retrieval_r1_media": []}
    for name, labels in answers.items():
        left = torch.stack(media[name])
        right = space.texts([_embedded(answer, embedding) for answer in labels])
        scores["retrieval_r1_text"].append(recall_at_1(left, right, labels))
        scores["retrieval_r1_media"].append(recall_at_1(right, left, labels))
    return {name: sum(found) / len(found) for name, found in scores.items() if found}


def _embedded(answer: Sequence[int], embedding: nn.Module) -> Tensor:
    device = next(embedding.parameters()).device
    vectors: Tensor = embedding(torch.tensor(answer, device=device))
    return vectors.detach()
