"""What admitting a sequence takes: blocks for its tokens, a slot for its adapter. One round's accounts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.tables import growth, missing
from okavango.serving.fairness import FairQueue
from okavango.serving.sequence import Sequence


class Demand:
    """What running sequences want of blocks that nobody holds, each content counted once.

    `most`: blocks that a sequence ever holds at a time, where it gives up those before its window.
    """

    def __init__(self, pool: BlockPool, running: Iterable[Sequence], most: int | None = None) -> None:
        self._pool = pool
        self._most = most
        self._keys: set[bytes] = set()
        self._own = 0
        self._growth = 0
        self._count = 0
        for sequence in running:
            self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        keys, own = self._wants(sequence)
        self._keys |= keys
        self._own += own
        self._growth += self._may_want(sequence)
        self._count += 1

    def fits(self, sequence: Sequence, caution: float) -> bool:
        """Whether there are blocks for one more.

        To preempt is dearer than to wait. So one block is left for each that runs, which it will want soon,
        and of all that they may grow by the fraction `caution`.
        """
        keys, own = self._wants(sequence)
        spare = self._count + caution * (self._growth + self._may_want(sequence))
        return len(self._keys | keys) + self._own + own + spare <= self._pool.num_available

    def new_tokens(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that nobody has computed or is about to."""
        keys, own = missing(sequence, self._pool)
        new = own + sum(not self._pool.is_known(key) for key in keys - self._keys)
        return min(len(sequence.tokens), new * self._pool.block_size)

    def _wants(self, sequence: Sequence) -> tuple[set[bytes], int]:
        """Contents that nobody holds and blocks of its own that its tokens so far take."""
        keys, own = missing(sequence, self._pool)
        room = len(keys) + own if self._most is None else max(0, self._most - len(sequence.held))
        return (keys, own) if len(keys) + own <= room else (set(), room)

    def _may_want(self, sequence: Sequence) -> int:
        more = growth(sequence, self._pool)
        if self._most is None:
            return more
        return max(0, min(more, self._most - self._pool.blocks_for(len(sequence.tokens))))


class Drains:
    """Adapters that get no new sequences, so that their slots come free for others that wait.

    `patience`: tokens that an adapter may be served ahead of a sequence that waits for a slot. Of those that
    are further ahead the one with the fewest sequences is chosen, each time anew: since it gets no new ones,
    the fewest only ever grow fewer. A preempted sequence had a slot already, and waits for no one's lead.
    """

    def __init__(self, queue: FairQueue, patience: int, running: Collection[Sequence]) -> None:
        self._queue = queue
        self._patience = patience
        self._running = running
        self._for: dict[str, str] = {}
        self._served: dict[str, float] | None = None

    def __contains__(self, digest: str) -> bool:
        return digest in self._for

    def add(self, sequence: Sequence, digest: str) -> None:
        """Choose whose slot the sequence shall have, if anybody's yet."""
        if digest in self._for or digest in self._for.values():
            return
        if self._served is None:
            self._served = self._least_served()
        bound = self._queue.virtual(sequence) + self._patience
        if self._queue.is_returned(sequence):
            bound = float("-inf")
        ahead = [d for d, virtual in self._served.items() if virtual > bound]
        if ahead:
            leases = Counter(s.digest for s in self._running)
            chosen = min(ahead, key=lambda d: (leases[d], d))
            self._for[chosen] = digest
            del self._served[chosen]

    def _least_served(self) -> dict[str, float]:
        """By adapter in a slot, the virtual time of that of its flows that was served least."""
        served: dict[str, float] = {}
        for sequence in self._running:
            if sequence.digest is not None:
                virtual = self._queue.virtual(sequence)
                served[sequence.digest] = min(virtual, served.get(sequence.digest, virtual))
        return served
