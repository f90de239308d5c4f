"""What the scheduler decides for one step, and what it tells of how it came to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from okavango.serving.cache.parking import Move
from okavango.serving.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, computed in this step, from position `start`.

    The last of them may be a `draft`: tokens that the sequence has not yet got, and may never get.
    """

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def sure_end(self) -> int:
        return self.end - len(self.draft)

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.sure_end], *self.draft]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be picked."""
        return self.sure_end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Load:
    """Copy an adapter's `weights` into a slot, whose former tenant is gone."""

    slot: int
    digest: str
    weights: Any


@dataclass(frozen=True)
class Step:
    """What to do next: park blocks, restore others, copy adapters into slots, then compute chunks.

    Chunks of one slot are adjacent.
    """

    loads: tuple[Load, ...]
    chunks: tuple[Chunk, ...]
    parks: tuple[Move, ...] = ()
    restores: tuple[Move, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first row, end row) of every adapter in the step; the bare base's rows have none."""
        rows: list[tuple[int, int, int]] = []
        position = 0
        for chunk in self.chunks:
            slot, end = chunk.sequence.slot, position + chunk.count
            if rows and rows[-1][0] == slot:
                rows[-1] = (slot, rows[-1][1], end)
            else:
                rows.append((slot, position, end))
            position = end
        return tuple(row for row in rows if row[0] != 0)


@dataclass
class Tally:
    """What one call of `schedule` did and could not do; for metrics.

    Attributes:
        waits: sequences that had no part in the step, by what they wait for: seat, blocks, slot, budget, or
            prefix (another sequence is computing their next block).
        preempted: sequences that lost their blocks.
        reused_tokens: tokens whose blocks were there already.
        restored_tokens: tokens that come back from the host.
        prefill_tokens: tokens of prompts, or of sequences that are computed again.
    """

    waits: Counter[str] = field(default_factory=Counter)
    preempted: int = 0
    reused_tokens: int = 0
    restored_tokens: int = 0
    prefill_tokens: int = 0
