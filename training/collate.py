"""Examples → rows of tokens → batches of tensors.

Rows are rendered as serving renders them and never cut: one that is too long is an error before training
starts. What comes after the last token to be predicted has no influence on the loss and is left out.
"""

# Shapes: L predicted tokens of a batch; G, S, E as in modalities.projector; T as in packing

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from okavango.modalities.content import Message
from okavango.modalities.prompt import Renderer, Span
from okavango.modalities.rope import places_of
from okavango.platform.errors import DataError, PromptError
from okavango.training.dataset import Dataset, Example
from okavango.training.packing import Layout
from okavango.training.tight import Tight, rounded, tight_layout

NO_LABEL = -100
"""What stands for no token to be learned, as in torch's cross_entropy."""

_COUNTS_AN_OCTAVE = 4  # of sizes that a tight batch's predicted tokens are rounded up to

LoadMedium = Callable[[str, str], Tensor]
"""(modality, digest) → what a trainee takes: pooled features [G, S, E], or what `Encoder.prepare` gives."""


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
        own: [T] whether a token is one of a row's, and no padding.
        predicting: [L] positions whose next token is predicted.
        labels: [L] these next tokens, or NO_LABEL.
        spans: where media go, in T.
        media: by modality, one a medium, in the order of their first spans.
        places: [3, T] where the decoder tells a medium's positions by row and column, and there are any.
    """

    layout: Layout | Tight
    tokens: Tensor
    own: Tensor
    predicting: Tensor
    labels: Tensor
    spans: tuple[Span, ...]
    media: Mapping[str, tuple[Tensor, ...]]
    places: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Media stay where they are: who takes them knows where to."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "own", "predicting", "labels")}
        places = self.places.to(device) if self.places is not None else None
        layout = self.layout.to(device) if isinstance(self.layout, Tight) else self.layout
        return replace(self, **moved, layout=layout, places=places)


def render_rows(
    dataset: Dataset, renderer: Renderer, system: str | None, max_length: int, *, last_turn: bool = False
) -> list[Row]:
    """Every row of a dataset, rendered.

    Args:
        last_turn: learn a row's last answer alone.

    Raises:
        DataError: with file and line of every row that cannot be rendered or is longer than `max_length`.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for i, example in enumerate(dataset.rows()):
        where = dataset.where(i)
        try:
            messages = last_learned(example.messages) if last_turn else example.messages
            row = render_row(replace(example, messages=messages), renderer, system)
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
            remedy="shorten or remove them, or raise max_length and batch_tokens up to the base's context",
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


def last_learned(messages: Sequence[Message]) -> tuple[Message, ...]:
    """With the last of the answers that are learned as the only one."""
    *_, last = (i for i, each in enumerate(messages) if each.role == "assistant" and each.is_learned)
    return tuple(replace(each, is_learned=i == last) for i, each in enumerate(messages))


def collate(rows: Sequence[Row], load: LoadMedium, *, tight: bool = False) -> Batch:
    """Pack rows, with their media.

    Args:
        tight: without padding between them, as training.tight has it; no span may look ahead.
    """
    shared = _shared(rows)
    lengths = [row.length - shared for row in rows]
    longest = max(lengths)
    layout: Layout | Tight
    if tight:
        layout = tight_layout(shared, lengths)
        total, sizes = len(layout.places), lengths
    else:
        layout = Layout(shared, len(rows), longest, _mutual(rows, shared))
        total, sizes = shared + len(rows) * longest, [longest] * len(rows)
    # where a row's position 0 would stand in T, so that its position p stands at start + p
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    # what fills the padding is never seen by a token that counts
    tokens, is_own = np.zeros(total, np.int64), np.zeros(total, np.bool_)
    tokens[:shared], is_own[:shared] = rows[0].tokens[:shared], True
    for row, start in zip(rows, starts, strict=True):
        own = slice(start + shared, start + row.length)
        tokens[own], is_own[own] = row.tokens[shared:-1], True
    predicted = [np.flatnonzero(row.loss) for row in rows]
    count = sum(map(len, predicted))
    none = rounded(count, _COUNTS_AN_OCTAVE) - count if tight else 0
    return Batch(
        layout=layout,
        tokens=torch.from_numpy(tokens),
        own=torch.from_numpy(is_own),
        predicting=_long(
            [*(at - 1 + start for at, start in zip(predicted, starts, strict=True)), np.full(none, total - 1)]
        ),
        labels=_long(
            [*(row.tokens[at] for row, at in zip(rows, predicted, strict=True)), np.full(none, NO_LABEL)]
        ),
        spans=tuple(
            replace(span, start=span.start + start)
            for row, start in zip(rows, starts, strict=True)
            for span in row.spans
        ),
        media=load_media([(row.spans, row.media) for row in rows], load),
        places=_places(rows, shared, starts, layout),
    )


def _mutual(rows: Sequence[Row], shared: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (i, span.start - shared, span.end - shared)
        for i, row in enumerate(rows)
        for span in row.spans
        if span.looks_ahead
    )


def load_media(
    rows: Iterable[tuple[Sequence[Span], Sequence[str]]], load: LoadMedium
) -> dict[str, tuple[Tensor, ...]]:
    """Rows' media by modality, each once for its first span."""
    found: dict[str, list[Tensor]] = {}
    for spans, digests in rows:
        for span, digest in zip(spans, digests, strict=True):
            if span.offset == 0:
                found.setdefault(span.modality, []).append(load(span.modality, digest))
    return {modality: tuple(media) for modality, media in found.items()}


def _places(rows: Sequence[Row], shared: int, starts: Sequence[int], layout: Layout | Tight) -> Tensor | None:
    if not any(span.grid for row in rows for span in row.spans):
        return None
    places = layout.positions(torch.device("cpu")).expand(3, -1).clone()
    for row, start in zip(rows, starts, strict=True):
        own = torch.as_tensor(places_of(row.length, row.spans)[0][:, shared:])
        places[:, start + shared : start + row.length] = own
    return places


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


def _long(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
