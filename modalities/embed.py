"""Tokens and projected media → the decoder's input embeddings; the same function in training and serving."""

# Shapes: B batch, N tokens, M tokens of one medium, D decoder width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from okavango.modalities.prompt import Span


def place(embeddings: Tensor, row: int, spans: Sequence[Span], media: Sequence[Tensor]) -> None:
    """Overwrite embeddings[row] ([B, N, D], in place) at each span with its part of its medium's [M, D]."""
    for span, vectors in zip(spans, media, strict=True):
        chosen = vectors[span.offset : span.offset + span.length]
        embeddings[row, span.start : span.end] = chosen.to(embeddings.dtype)


def embedding_std(decoder: nn.Module) -> float:
    """How loud the decoder's own token embeddings are: their standard deviation over all entries."""
    with torch.no_grad():
        return float(decoder.get_input_embeddings().weight.float().std())  # type: ignore[operator]
