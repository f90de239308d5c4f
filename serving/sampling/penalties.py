"""What a sequence's own tokens, and its request, change about its logits. Kept up as tokens come."""

# Shapes: B rows, V vocabulary, N tokens of one row that an entry names

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from okavango.serving.types import SamplingParams


class Entries:
    """A number for each of some tokens. Adding one costs the same however many there are."""

    def __init__(self, entries: Iterable[tuple[int, float]] = ()) -> None:
        sums: dict[int, float] = {}
        for token, value in entries:
            sums[token] = sums.get(token, 0.0) + value
        spare = [0] * 16
        self._places = {token: place for place, token in enumerate(sums)}
        self._tokens = torch.tensor([*sums, *spare])
        self._values = torch.tensor([*sums.values(), *spare], dtype=torch.float32)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, token: int) -> bool:
        return token in self._places

    @property
    def tokens(self) -> Tensor:
        """[N], each once."""
        return self._tokens[: len(self)]

    @property
    def values(self) -> Tensor:
        """[N]"""
        return self._values[: len(self)]

    def add(self, token: int, value: float) -> None:
        place = self._places.get(token)
        if place is not None:
            self._values[place] += value
            return
        place = len(self)
        if place == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.empty_like(self._tokens)])
            self._values = torch.cat([self._values, torch.empty_like(self._values)])
        self._tokens[place], self._values[place] = token, value
        self._places[token] = place


class Penalties:
    """One sequence's bias and penalties.

    Attributes:
        bias: what is added first.
        repeated: tokens of prompt and answer, each with the factor of its logit.
        counted: what is added last, for tokens of the answer.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._factor = params.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self.bias = Entries(params.logit_bias)
        self.repeated = Entries((token, self._factor) for token in dict.fromkeys(prompt) if self._factor != 1)
        self.counted = Entries()

    @property
    def is_empty(self) -> bool:
        return not (len(self.bias) or len(self.repeated) or len(self.counted))

    def accept(self, token: int) -> None:
        """Count a token of the answer."""
        if self._factor != 1 and token not in self.repeated:
            self.repeated.add(token, self._factor)
        if self._presence or self._frequency:
            first = 0.0 if token in self.counted else self._presence
            self.counted.add(token, -first - self._frequency)


def apply_penalties(logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalties]) -> None:
    """Change these rows of [B, V] in place: bias, then repetition, then counts, as vLLM does."""
    _add(logits, rows, [each.bias for each in penalties])
    _repeat(logits, rows, [each.repeated for each in penalties])
    _add(logits, rows, [each.counted for each in penalties])


def _add(logits: Tensor, rows: Sequence[int], entries: Sequence[Entries]) -> None:
    if any(map(len, entries)):
        places, values = _flat(logits, rows, entries)
        logits.view(-1).index_add_(0, places, values)


def _repeat(logits: Tensor, rows: Sequence[int], entries: Sequence[Entries]) -> None:
    if any(map(len, entries)):
        places, factors = _flat(logits, rows, entries)
        values = logits.view(-1)[places]
        logits.view(-1)[places] = torch.where(values < 0, values * factors, values / factors)


def _flat(logits: Tensor, rows: Sequence[int], entries: Sequence[Entries]) -> tuple[Tensor, Tensor]:
    """Where in the flattened logits the entries are, and their values."""
    width = logits.shape[1]
    places = torch.cat([each.tokens + row * width for row, each in zip(rows, entries, strict=True)])
    values = torch.cat([each.values for each in entries])
    return places.to(logits.device), values.to(logits.device)
