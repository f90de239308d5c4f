"""Examples → rows of tokens → batches of tensors.

Rows are rendered as serving renders them and never cut: one that is too long is an error before training
starts. What comes after the last token to be predicted has no influence on the loss and is left out.
"""

# Shapes: L predicted tokens of a batch, M media, E tokens a medium, C encoder width; T as in packing

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from okavango.modalities.prompt import Renderer, Span
from okavango.platform.errors import DataError, PromptError
from okavango.training.dataset import Dataset, Example
from okavango.training.packing import Layout

LoadFeatures = Callable[[str], Tensor]
"""A medium's digest → its pooled features [E, C]."""


@dataclass(frozen=True)
class Row:
    """A rendered example.

    Attributes:
        tokens: ids, those after the last predicted one left out.
        loss: which of them are to be predicted.
        media: digests, one a span.
    """

    line: int
    tokens: NDArray[np.int32]
    loss: NDArray[np.bool_]
    spans: tuple[Span, ...]
    media: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens that the decoder is fed: the last one is predicted only."""
        return len(self.tokens) - 1

    @property
    def answer_tokens(self) -> int:
        return int(self.loss.sum())


@dataclass(frozen=True)
class Batch:
    """Rows packed into one sequence.

    Attributes:
        tokens: [T] ids.
        predicting: [L] positions whose next token is predicted.
        labels: [L] these next tokens.
        spans: where media go, in T.
        features: [M, E, C] pooled features, one a span; None without media.
    """

    layout: Layout
    tokens: Tensor
    predicting: Tensor
    labels: Tensor
    spans: tuple[Span, ...]
    features: Tensor | None

    def to(self, device: torch.device) -> Batch:
        names = ("tokens", "predicting", "labels", "features")
        moved = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **moved)


def render_rows(dataset: Dataset, renderer: Renderer, system: str | None, max_length: int) -> list[Row]:
    """Every row of a dataset, rendered.

    Raises:
        DataError: with file and line of every row that cannot be rendered or is longer than `max_length`.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for example in dataset.rows():
        where = f"{dataset.path}:{example.line}"
        try:
            row = render_row(example, renderer, system)
        except PromptError as error:
            faults.append(f"{where}: {error}")
            continue
        if len(row.tokens) > max_length:
            faults.append(f"{where}: {len(row.tokens):,} tokens, over the limit of {max_length:,}")
        rows.append(row)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(dataset)} rows cannot be used",
            tuple(faults),
            where=str(dataset.path),
            remedy="shorten or remove them, or raise max_length up to the base's context",
        )
    return rows


def render_row(example: Example, renderer: Renderer, system: str | None) -> Row:
    """Raises PromptError as Renderer.conversation does."""
    rendered = renderer.conversation(example.messages, system)
    loss = np.array(rendered.loss, np.bool_)
    loss[0] = False  # nothing comes before it that could predict it
    end = int(np.flatnonzero(loss)[-1]) + 1
    spans = tuple(span for span in rendered.spans if span.end < end)
    return Row(
        line=example.line,
        tokens=np.array(rendered.tokens[:end], np.int32),
        loss=loss[:end],
        spans=spans,
        media=tuple(medium.digest for medium in rendered.media[: len(spans)]),
    )


def collate(rows: Sequence[Row], load: LoadFeatures) -> Batch:
    """Pack rows, with the features of their media."""
    shared = _shared(rows)
    length = max(row.length for row in rows) - shared
    layout = Layout(shared, len(rows), length)
    # what fills the padding is never seen by a token that counts
    own = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        own[i, : row.length - shared] = row.tokens[shared:-1]
    # where a row's position 0 would stand in T, so that its position p stands at start + p
    starts = [i * length for i in range(len(rows))]
    predicted = [np.flatnonzero(row.loss) for row in rows]
    return Batch(
        layout=layout,
        tokens=_long([rows[0].tokens[:shared], own.ravel()]),
        predicting=_long([at - 1 + start for at, start in zip(predicted, starts, strict=True)]),
        labels=_long([row.tokens[at] for row, at in zip(rows, predicted, strict=True)]),
        spans=tuple(
            replace(span, start=span.start + start)
            for row, start in zip(rows, starts, strict=True)
            for span in row.spans
        ),
        features=_stack([load(digest) for row in rows for digest in row.media]),
    )


def _shared(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with, short of the first medium and of the first prediction."""
    limit = min(_private(row) for row in rows)
    first = rows[0].tokens[:limit]
    for row in rows[1:]:
        differs = np.flatnonzero(row.tokens[: len(first)] != first)
        first = first[: differs[0]] if len(differs) else first
    # one row alone shares nothing
    return len(first) if len(rows) > 1 else 0


def _private(row: Row) -> int:
    starts = [span.start for span in row.spans]
    return min([int(row.loss.argmax()) - 1, row.length - 1, *starts])


def _stack(features: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(features)) if features else None


def _long(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
