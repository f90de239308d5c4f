"""Steps under way on a device while the host goes on: one may begin before the tokens of the last are known.

Where all rows take their greatest logit, and nothing else is to be decided, the next step is the same one a
position further: its tokens are on the device already. So the device never waits for the host. A sequence
that turns out to have ended is in that step all the same; its row counts for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch
from torch import Tensor

from okavango.serving.sampling.state import SamplingState
from okavango.serving.step import Chunk, Step, Tally

_NO_TOKEN = -1


@dataclass(frozen=True)
class Row:
    """A chunk, and which of the step's logits follow the last of its tokens that are sure."""

    chunk: Chunk
    index: int


class Greatest:
    """The tokens [B] of the greatest logits [B, V]: `tokens` at once on the device, `take` on the host."""

    def __init__(self, logits: Tensor) -> None:
        best, self.tokens = logits.max(-1)
        shown = torch.where(best.isfinite(), self.tokens, _NO_TOKEN)
        self._shown = shown.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if logits.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def take(self) -> list[int | None]:
        """None for a row whose logits are no numbers. Waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [None if token == _NO_TOKEN else token for token in self._shown.tolist()]


@dataclass(frozen=True)
class Flight:
    """A step under way.

    Attributes:
        rows: those after which a token is picked.
        greatest: where they all take the greatest logit; None where the sampler has to look at them.
        tally: how the scheduler came to it.
        began: on the clock of time.perf_counter.
    """

    step: Step
    rows: list[Row]
    logits: Tensor | None
    greatest: Greatest | None
    tally: Tally
    began: float = field(default_factory=time.perf_counter)

    def tokens(self, chunks: Sequence_[Chunk]) -> Tensor:
        """On the device, what the next step's chunks begin with."""
        assert self.greatest is not None
        places = {row.chunk.sequence: row.index for row in self.rows}
        index = [places[chunk.sequence] for chunk in chunks]
        tokens = self.greatest.tokens
        if index == list(range(len(tokens))):
            return tokens
        chosen = torch.tensor(index, pin_memory=tokens.is_cuda)  # or the copy would wait for the step
        return tokens[chosen.to(tokens.device, non_blocking=True)]


def takes_greatest(state: SamplingState) -> bool:
    """Whether the next token is that of the greatest logit, and nobody asks for more."""
    return state.rng is None and state.params.logprobs is None and not state.adjusts
