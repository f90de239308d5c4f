"""Who is served next: weighted fair queueing over flows by tokens. Plain Python, no clock.

A flow is one principal's requests for one adapter. Its virtual time is the tokens that were computed for it,
divided by its principal's weight; of the flows that wait, the one with the least goes first (start-time fair
queueing, Goyal et al. 1996; by tokens as they are served, Sheng et al. 2024). A flow that comes anew starts
at the time of the one that was served last: being away saves nothing up, and costs nothing.

Within a flow, the lower `Request.priority` goes first, then the earlier request: a principal can hold up its
own requests so, and nobody else's.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from okavango.serving.sequence import Sequence

# Flows that are away and still ahead. Where callers come but once each, the time never catches up with them.
_MOST_AWAY = 1024


@dataclass(eq=False)
class Flow:
    """`members`: its sequences that wait or run. `waiting`: those that never ran, the next one first."""

    weight: float
    virtual: float
    members: int = 0
    waiting: list[Sequence] = field(default_factory=list)


def _within_flow(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class FairQueue:
    """Sequences that wait, and the accounts of all flows that have any sequence.

    Preempted sequences stand before all others, in the order in which they first came.

    Args:
        weights: shares by principal; 1 for those that it does not name.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._flows: dict[tuple[str, str | None], Flow] = {}
        self._returned: list[Sequence] = []
        self._now = 0.0  # the virtual time of whoever was admitted last
        self._arrivals = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for flow in self._flows.values():
            yield from flow.waiting

    def add(self, sequence: Sequence) -> None:
        """A sequence that is new here."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        flow = self._flows.get(sequence.flow)
        if flow is None:
            weight = self._weights.get(sequence.request.principal, 1.0)
            flow = self._flows[sequence.flow] = Flow(weight, self._now)
        elif flow.members == 0:
            flow.virtual = max(flow.virtual, self._now)
        flow.members += 1
        self._size += 1
        insort(flow.waiting, sequence, key=_within_flow)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that ran and was preempted."""
        self._size += 1
        insort(self._returned, sequence, key=_arrival)

    def take(self, sequence: Sequence) -> None:
        """A waiting sequence is admitted."""
        if sequence not in self._returned:
            self._now = max(self._now, self.virtual(sequence))
        self._remove(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it was."""
        if sequence in self:
            self._remove(sequence)
        flow = self._flows[sequence.flow]
        flow.members -= 1
        if flow.members == 0:
            self._prune()

    def charge(self, sequence: Sequence, tokens: int) -> None:
        flow = self._flows[sequence.flow]
        flow.virtual += tokens / flow.weight

    def virtual(self, sequence: Sequence) -> float:
        """Tokens that its flow has had, by its weight."""
        return self._flows[sequence.flow].virtual

    def is_returned(self, sequence: Sequence) -> bool:
        return sequence in self._returned

    def behind(self, sequence: Sequence) -> int:
        """How many wait for what this one waits for, itself included."""
        return 1 if sequence in self._returned else len(self._flows[sequence.flow].waiting)

    def heads(self) -> Iterator[Sequence]:
        """Who goes next, in order: the preempted, then the first of each flow.

        The caller may `take` what it was given: then the flow's next follows in its turn. Else its flow is
        left alone for this round.
        """
        yield from tuple(self._returned)
        order = [(f.virtual, f.waiting[0].arrival, f) for f in self._flows.values() if f.waiting]
        heapq.heapify(order)
        while order:
            _, arrival, flow = heapq.heappop(order)
            yield flow.waiting[0]
            if flow.waiting and flow.waiting[0].arrival != arrival:
                heapq.heappush(order, (flow.virtual, flow.waiting[0].arrival, flow))

    def __contains__(self, sequence: Sequence) -> bool:
        flow = self._flows.get(sequence.flow)
        return sequence in self._returned or (flow is not None and sequence in flow.waiting)

    def _remove(self, sequence: Sequence) -> None:
        self._size -= 1
        if sequence in self._returned:
            self._returned.remove(sequence)
        else:
            self._flows[sequence.flow].waiting.remove(sequence)

    def _prune(self) -> None:
        """Forget flows that are away and would start no later than a new one; of too many others, those that
        are the least ahead."""
        if not any(flow.members for flow in self._flows.values()):
            self._flows.clear()
            self._now = 0.0
            return
        away = {key: flow.virtual for key, flow in self._flows.items() if not flow.members}
        gone = [key for key, virtual in away.items() if virtual <= self._now]
        if len(away) - len(gone) > _MOST_AWAY:
            gone = sorted(away, key=away.__getitem__)[: -_MOST_AWAY // 2]
        for key in gone:
            del self._flows[key]

    def check_integrity(self, running: list[Sequence]) -> None:
        """Flows count their sequences, and each stands where it should, in order."""
        members: dict[tuple[str, str | None], int] = {}
        for sequence in [*self, *running]:
            members[sequence.flow] = members.get(sequence.flow, 0) + 1
        counted = {key: flow.members for key, flow in self._flows.items() if flow.members}
        assert members == counted, "a flow has lost count"
        assert self._size == sum(1 for _ in self), "the queue has lost count"
        for flow in self._flows.values():
            assert flow.waiting == sorted(flow.waiting, key=_within_flow), "a flow is out of order"
        assert self._returned == sorted(self._returned, key=_arrival), "the preempted are out of order"
