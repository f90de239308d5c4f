"""Whose prompt is computed next, and how much of it; and where a step has room for guesses. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.tables import next_key
from okavango.serving.sequence import Sequence
from okavango.serving.step import Chunk, Tally


def prompts(
    running: Iterable[Sequence], budget: int, pool: BlockPool, tally: Tally
) -> Iterator[tuple[Sequence, int]]:
    """Prompts to compute in order, each with the most tokens that it may have.

    The one that was admitted first has half of the budget, so that it goes on whatever comes; the rest goes
    to the shortest first, which are soonest out of the way, and what they leave to the first.
    """
    ready = _not_waiting([s for s in running if s.num_uncomputed > 1], pool, tally)
    if not ready:
        return
    first, *others = ready
    others.sort(key=lambda s: s.num_uncomputed)
    room = budget - sum(s.num_uncomputed for s in others)
    yield first, max(-(-budget // 2), room)
    for sequence in others:
        yield sequence, budget


def whole(sequence: Sequence, count: int) -> int:
    """`count` tokens, or as many as end nowhere within positions that see each other: fewer, where any are
    left before these, or else all of them."""
    start = sequence.num_computed
    for span in sequence.request.prompt.spans:
        if span.looks_ahead and span.start < start + count < span.end:
            return span.start - start if span.start > start else span.end - start
    return count


def _not_waiting(unread: list[Sequence], pool: BlockPool, tally: Tally) -> list[Sequence]:
    """Those whose next block nobody before them is computing; those in the midst of one come first."""
    computing: set[bytes] = set()
    waiting: set[Sequence] = set()
    for sequence in sorted(unread, key=lambda s: s.num_computed % pool.block_size == 0):
        key = next_key(sequence, pool)
        if key in computing and sequence.num_computed % pool.block_size == 0:
            waiting.add(sequence)
        elif key is not None:
            computing.add(key)
    tally.waits["prefix"] += len(waiting)
    return [sequence for sequence in unread if sequence not in waiting]


def with_guesses(chunks: Iterable[Chunk], rows: int, block_size: int) -> list[Chunk]:
    """A step of single tokens, filled up to so many rows: a few more cost little where there are few."""
    singles = list(chunks)
    room = rows - len(singles)
    filled = []
    for chunk in singles:
        sequence = chunk.sequence
        most = most_guesses(sequence, room, block_size)
        draft = sequence.guesses.guess(sequence.tokens, most) if sequence.guesses else ()
        room -= len(draft)
        filled.append(Chunk(sequence, chunk.start, 1 + len(draft), draft))
    return filled


def most_guesses(sequence: Sequence, room: int, block_size: int) -> int:
    """How many of `room` tokens may be guessed behind a sequence's last one: what its answer may yet have, in
    the block that this one lies in. Guesses get no blocks of their own."""
    space = -len(sequence.tokens) % block_size
    return min(room, space, sequence.max_tokens - sequence.num_generated - 1)
