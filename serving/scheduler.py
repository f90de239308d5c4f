"""Which sequences run in a step, and with how many tokens. Plain Python: no torch, no clock.

Continuous batching with chunked prefill: running sequences' next tokens come first, what is left of the
step's token budget goes to prompts, first come, first served. A sequence is admitted when its slot is free
and all the KV blocks that it may ever need can be reserved, so that nothing that runs waits for anything.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """`max_step_tokens`: tokens computed in one step, over all sequences."""

    max_sequences: int
    max_step_tokens: int


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, computed in this step, from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be picked."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Step:
    """What to do next: copy adapters into slots, then compute chunks, those of one slot adjacent."""

    loads: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]

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


class Scheduler:
    """Owns every sequence from `add` to `drop`, and what they hold of blocks and slots."""

    def __init__(self, pool: BlockPool, slots: SlotTable, limits: Limits) -> None:
        self.pool = pool
        self.slots = slots
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapter and media are at hand. The engine bounds how many there are."""
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        loads = self._admit()
        budget = self.limits.max_step_tokens
        chunks = []
        # the shortest rest first: a running sequence needs one token, a prompt the rest of its own
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            count = min(sequence.num_uncomputed, budget)
            if count == 0:
                break
            budget -= count
            chunks.append(Chunk(sequence, sequence.num_computed, count))
            self._grow(sequence, chunks[-1].end)
        return Step(tuple(loads), tuple(sorted(chunks, key=lambda c: c.sequence.slot)))

    def drop(self, sequence: Sequence) -> None:
        """Finish or abort a sequence, wherever it is: all that it holds is free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.blocks, unused=sequence.num_reserved)
            sequence.blocks, sequence.num_reserved = [], 0
            if sequence.digest is not None:
                self.slots.release(sequence.digest)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self) -> list[Sequence]:
        """Move sequences from waiting to running, in order; returns those whose adapter must be loaded."""
        loads = []
        while self.waiting and len(self.running) < self.limits.max_sequences:
            sequence = self.waiting[0]
            needed = self.pool.blocks_for(sequence.num_prompt + sequence.max_tokens)
            if not self.pool.reserve(needed):
                break
            if sequence.digest is not None:
                lease = self.slots.acquire(sequence.digest)
                if lease is None:
                    self.pool.release([], unused=needed)
                    break
                sequence.slot = lease.slot
                if lease.load:
                    loads.append(sequence)
            sequence.num_reserved = needed
            self.running.append(self.waiting.popleft())
        return loads

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.blocks) < self.pool.blocks_for(tokens):
            sequence.blocks.append(self.pool.take())
            sequence.num_reserved -= 1

    def check_integrity(self) -> None:
        """Blocks, slots and sequences agree with each other."""
        self.pool.check_integrity()
        self.slots.check_integrity()
        held = [block for sequence in self.running for block in sequence.blocks]
        assert len(held) == len(set(held)) == self.pool.num_used, "block tables and pool disagree"
        reserved = sum(sequence.num_reserved for sequence in self.running)
        assert self.pool.num_used + self.pool.num_available + reserved == self.pool.num_blocks
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"
