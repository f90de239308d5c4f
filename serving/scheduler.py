"""Which sequences run in a step, and with how many tokens. Plain Python: no torch, no clock.

Continuous batching with chunked prefill over shared blocks. A step has three parts:

    admit    the most deserving waiting sequences, while there are seats, blocks for their tokens, and slots
    reuse    full blocks whose content is there already are taken over instead of computed
    plan     one token for each sequence that generates, what is left of the budget for prompts

Nothing is reserved for tokens to come. Where blocks run out, the least deserving sequence is preempted: it
loses its blocks, keeps its tokens, and is computed again later, before anybody new is admitted. A sequence
that was preempted once yields only to those that were, too, and came before it. So the first of these can
always have every block there is, and everybody finishes in turn.

Slots: a sequence whose adapter finds no slot is passed over. Once the adapters that hold one have been served
`slot_patience` tokens more than it has, the one with the fewest sequences gets no new ones, until its slot
is free. These fewest only ever grow fewer, so the slot comes. Pinned adapters keep theirs, and are loaded
before any request wants them, as soon as a slot can be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from okavango.serving.adapters.pins import Preloads
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.admission import Demand, Drains
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.parking import Parking
from okavango.serving.cache.tables import check_table, drop_unseen, publish, reuse, span
from okavango.serving.fairness import FairQueue
from okavango.serving.sequence import Sequence
from okavango.serving.step import Chunk as Chunk
from okavango.serving.step import Load, Tally
from okavango.serving.step import Step as Step
from okavango.serving.turns import prompts, whole, with_guesses

# A preemption makes admission so much more cautious, and each step a little less. A stream that stops midway
# is worse than one that begins later. Simulated with memory for eight long answers at a time, this halves the
# preemptions for 7 per cent more steps; more caution would cost the more where answers end early.
_CAUTION_STEP, _CAUTION_DECAY = 0.1, 0.98


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        max_step_tokens: tokens computed in one step, over all sequences.
        max_prefill_tokens: of these, tokens of prompts while anybody generates; None leaves all that is left.
        slot_patience: tokens that adapters in slots may be served ahead of one that waits for a slot.
        share_prefixes: whether principals share what they have computed, or each only with itself.
        draft_rows: a step that computes single tokens is filled up to so many with guesses; 0 makes none.
        weights: shares of the machine by principal; 1 for those that it does not name.
    """

    max_sequences: int
    max_step_tokens: int
    max_prefill_tokens: int | None = None
    slot_patience: int = 1024
    share_prefixes: bool = False
    draft_rows: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)


class Scheduler:
    """Owns every sequence from `add` to `drop`, and what they hold of blocks and slots.

    Args:
        parking: blocks that the host can keep of preempted sequences; 0 has all of them computed again.
        window: positions that a token sees at most, itself included; None where some layer sees all.
    """

    def __init__(
        self,
        pool: BlockPool,
        slots: SlotTable,
        limits: Limits,
        parking: int = 0,
        window: int | None = None,
    ) -> None:
        self.pool = pool
        self.window = window
        self._most_blocks = None if window is None else span(window, limits.max_step_tokens, pool)
        self.slots = slots
        self.limits = limits
        self.waiting = FairQueue(limits.weights)
        self.running: list[Sequence] = []
        self.parking = Parking(parking, pool)
        self.preloads = Preloads(slots)
        self.tally = Tally()
        # the fraction of what running sequences may yet grow by that admission leaves free
        self._caution = 0.0

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that there are blocks for; None if it may be of any length."""
        if self._most_blocks is not None and self._most_blocks <= self.pool.num_blocks:
            return None
        return self.pool.num_blocks * self.pool.block_size

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.preloads)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapter and media are at hand. The engine bounds how many there are."""
        sequence.salt = "" if self.limits.share_prefixes else sequence.request.principal
        self.waiting.add(sequence)

    def schedule(self) -> Step:
        """The next step. Its chunks must be committed or dropped before the next call.

        A step has no chunks only where it preempted somebody or loads what is pinned; a later one has some.
        """
        self.tally = Tally()
        self.parking.begin()
        loads = [*self.preloads.begin(), *self._admit()]
        for sequence in self.running:
            self._reuse(sequence)
        chunks = self._plan()
        self._caution = min(1.0, self._caution * _CAUTION_DECAY + _CAUTION_STEP * self.tally.preempted)
        chunks.sort(key=lambda chunk: chunk.sequence.slot)
        return Step(tuple(loads), tuple(chunks), self.parking.parks, self.parking.restores)

    def follow(self, step: Step) -> Step | None:
        """The step after one of single tokens, before that one is committed: the same, a position further.

        None where there is more to decide: somebody waits, has a prompt to be read, or would need a block
        that another one holds. Who gets its last token from `step` has no part in it.
        """
        chunks, pool = step.chunks, self.pool
        if self.waiting or self.preloads or len(chunks) != len(self.running):
            return None
        if any(chunk.count != 1 or not chunk.samples for chunk in chunks):
            return None
        going = [c for c in chunks if c.sequence.num_generated + 1 < c.sequence.max_tokens]
        full = [c.sequence for c in going if len(c.sequence.blocks) < pool.blocks_for(c.end + 1)]
        if not going or len(full) > pool.num_available:
            return None
        for sequence in full:
            block = pool.take()
            assert block is not None
            sequence.blocks.append(block)
        self.tally = Tally()
        self._caution *= _CAUTION_DECAY
        return Step((), tuple(Chunk(chunk.sequence, chunk.end, 1) for chunk in going))

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """A step's chunks are computed: only now others may share the blocks that they filled."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            start = 0 if self.parking.is_back(sequence) else chunk.start
            publish(sequence, start, chunk.end, self.pool)
            self._drop_unseen(sequence)
            self.waiting.charge(sequence, max(0, chunk.end - sequence.num_charged))
            sequence.num_charged = max(sequence.num_charged, chunk.end)

    def drop(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Finish or abort a sequence, wherever it is: all that it holds is free at once.

        `forget`: nobody shall reuse what is in its blocks.
        """
        if sequence in self.running:
            for block in sequence.held if forget else ():
                self.pool.forget(block)
            self._stop(sequence)
        elif sequence not in self.waiting:
            return
        self.waiting.leave(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.held)
        sequence.blocks, sequence.num_computed, sequence.num_dropped = [], 0, 0
        if sequence.digest is not None:
            self.slots.release(sequence.digest)

    def _admit(self) -> list[Load]:
        """Move sequences from waiting to running, in order; returns what must be loaded for them."""
        if not self.waiting:
            return []
        loads: list[Load] = []
        demand = Demand(self.pool, self.running, self._most_blocks)
        # a pinned adapter's slot is nobody else's, however long it gets no new ones
        evictable = [s for s in self.running if s.digest not in self.slots.pinned]
        drains = Drains(self.waiting, self.limits.slot_patience, evictable)
        passed_over, reason = 0, ""
        for sequence in self.waiting.heads():
            if len(self.running) == self.limits.max_sequences:
                reason = "seat"
                break
            if not self._finds_slot(sequence, drains):
                passed_over += self.waiting.behind(sequence)
                continue
            if self.running and not demand.fits(sequence, self._caution):
                reason = "blocks"
                break
            loads += self._start(sequence, demand)
        self.tally.waits.update(slot=passed_over)
        if reason:
            self.tally.waits[reason] += len(self.waiting) - passed_over
        return loads

    def _finds_slot(self, sequence: Sequence, drains: Drains) -> bool:
        digest = sequence.digest
        if digest is None or (digest not in drains and self.slots.has_room(digest)):
            return True
        drains.add(sequence, digest)
        return False

    def _start(self, sequence: Sequence, demand: Demand) -> list[Load]:
        """Run a sequence; what must be loaded for it, if anything.

        Its flow is charged for its prompt at once, or one flow would get all the seats.
        """
        self.waiting.take(sequence)
        if sequence.num_charged == 0:
            self.waiting.charge(sequence, demand.new_tokens(sequence))
            sequence.num_charged = len(sequence.tokens)
        self.running.append(sequence)
        demand.add(sequence)
        if sequence.digest is None:
            return []
        lease = self.slots.acquire(sequence.digest)
        sequence.slot = lease.slot
        return [Load(lease.slot, sequence.digest, sequence.weights)] if lease.load else []

    def _reuse(self, sequence: Sequence) -> None:
        tokens = reuse(sequence, self.pool)
        self.tally.reused_tokens += tokens
        if sequence.num_preempted == 0:
            sequence.num_reused += tokens
        self.tally.restored_tokens += self.parking.come_back(sequence)
        self._drop_unseen(sequence)

    def _drop_unseen(self, sequence: Sequence) -> None:
        if self.window is not None:
            drop_unseen(sequence, self.window, self.pool)

    def _deserts(self, sequence: Sequence) -> tuple[bool, float, int, int]:
        """Sorts the more deserving first. Who was preempted before stands before all who were not."""
        if sequence.num_preempted:
            return False, 0.0, 0, sequence.arrival
        return True, self.waiting.virtual(sequence), sequence.request.priority, sequence.arrival

    def _preempt(self, sequence: Sequence) -> None:
        self.parking.leave(sequence, self.waiting)
        self._stop(sequence)
        sequence.num_preempted += 1
        self.tally.preempted += 1
        self.waiting.put_back(sequence)

    def _plan(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        unplanned = sorted(self.running, key=self._deserts)
        for sequence in [s for s in unplanned if s.num_uncomputed == 1]:
            is_left = sequence in unplanned
            if is_left and self._grow(sequence, 1, unplanned, may_yield=True):
                chunks.append(Chunk(sequence, sequence.num_computed, 1))
        if not any(s.num_uncomputed > 1 for s in self.running):
            return with_guesses(chunks, self.limits.draft_rows, self.pool.block_size)
        budget = self.limits.max_step_tokens - len(chunks)
        if chunks and self.limits.max_prefill_tokens is not None:
            budget = min(budget, self.limits.max_prefill_tokens)
        for sequence, most in prompts(self.running, budget, self.pool, self.tally):
            wanted = min(sequence.num_uncomputed, most, budget)
            if sequence not in unplanned or wanted <= 0:
                self.tally.waits["budget"] += sequence in unplanned
                continue
            room = self._grow(sequence, whole(sequence, wanted), unplanned, may_yield=False)
            count = whole(sequence, room)
            if count > room:  # no blocks for all of what must be computed together
                count = 0
            self.tally.waits["blocks"] += count == 0
            if count:
                chunks.append(Chunk(sequence, sequence.num_computed, count))
                budget -= count
                self.tally.prefill_tokens += count
        return chunks

    def _grow(self, sequence: Sequence, tokens: int, unplanned: list[Sequence], *, may_yield: bool) -> int:
        """Take blocks for the sequence's next tokens, from less deserving ones too; how many tokens fit.

        `unplanned`: who has no part in the step yet, the most deserving first. Those in the plan keep theirs.
        `may_yield`: the sequence goes itself where it is the least deserving, rather than stay and wait.
        """
        size = self.pool.block_size
        while len(sequence.blocks) < self.pool.blocks_for(sequence.num_computed + tokens):
            block = self.pool.take()
            if block is not None:
                sequence.blocks.append(block)
            elif unplanned[-1] is not sequence:
                self._preempt(unplanned.pop())
            elif may_yield:
                self._preempt(unplanned.pop())
                return 0
            else:
                break
        unplanned.remove(sequence)
        return min(tokens, len(sequence.blocks) * size - sequence.num_computed)

    def check_integrity(self) -> None:
        """Blocks, slots and sequences agree with each other."""
        self.pool.check_integrity()
        self.slots.check_integrity()
        self.waiting.check_integrity(self.running)
        self.pool.check_holders([sequence.held for sequence in self.running])
        assert all(not s.blocks and not s.num_computed for s in self.waiting), (
            "a waiting sequence holds blocks"
        )
        self.slots.check_holders([s.digest for s in self.running if s.digest is not None])
        for sequence in self.running:
            check_table(sequence, self.pool)
