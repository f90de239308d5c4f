"""Media and the answers about them, as a contrastive loss wants them."""

# Shapes: D decoder width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from okavango.training.collate import Row


@dataclass(frozen=True)
class Pair:
    """A medium, and the tokens of the answer that comes after it."""

    media: str
    answer: tuple[int, ...]


def find_pairs(rows: Sequence[Row], modality: str) -> list[Pair]:
    """Each medium of the rows with the first answer after it."""
    return [
        Pair(media, _answer_after(row, span.end))
        for row in rows
        for span, media in zip(row.spans, row.media, strict=True)
        if span.modality == modality and span.offset == 0
    ]


def answer_table(names: Sequence[tuple[int, ...]], embedding: nn.Module) -> tuple[Tensor, Tensor]:
    """[answers, D]: mean token embeddings, less what all of them have in common; and that, [D]."""
    with torch.no_grad():
        device = next(embedding.parameters()).device
        means = [embedding(torch.tensor(name, device=device)).float().mean(0) for name in names]
    table = torch.stack(means)
    return table - table.mean(0), table.mean(0)


def _answer_after(row: Row, position: int) -> tuple[int, ...]:
    start = position + int(row.loss[position:].argmax())
    length = int((~row.loss[start:]).argmax()) or len(row.loss) - start
    # without the end of the turn, which every answer has
    return tuple(int(token) for token in row.tokens[start : start + max(length - 1, 1)])
