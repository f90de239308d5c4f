"""Which adapter sits in which slot. Plain Python; the tensors are modalities.lora's.

    empty ──acquire──▶ leased (n) ──release──▶ idle ──acquire──▶ leased
                                                 └──evicted for another adapter, least recently used first

A pinned adapter is never evicted. One slot at least stays free of pins, so that every other adapter's turn
comes. Slot 0 is the bare base: it has no tensors, is never evicted and needs no lease.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

BASE_SLOT = 0


@dataclass(frozen=True)
class Lease:
    """A slot that holds an adapter until it is released. `load`: its tensors must be copied in first."""

    slot: int
    load: bool


class SlotTable:
    """`slots` slots for adapters, by digest, numbered from 1."""

    def __init__(self, slots: int) -> None:
        self.num_slots = slots
        self._empty = list(range(slots, 0, -1))
        self._slots: dict[str, int] = {}
        self._leases: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self.pinned: frozenset[str] = frozenset()

    @property
    def residents(self) -> tuple[str, ...]:
        """Digests that hold a slot, leased or idle."""
        return tuple(self._slots)

    def pin(self, digests: Collection[str]) -> None:
        """Evict none of these once they have a slot; those of the last call are as all others again."""
        assert len(set(digests)) < self.num_slots, "pins leave no slot for other adapters"
        before, self.pinned = self.pinned, frozenset(digests)
        for digest in sorted(before - self.pinned):
            self._settle(digest)
        for digest in self.pinned:
            self._idle.pop(digest, None)

    def has_room(self, digest: str) -> bool:
        """Whether `acquire` would find a slot: the adapter's own, or one that may be evicted."""
        return digest in self._slots or bool(self._empty or self._idle)

    def acquire(self, digest: str) -> Lease:
        """Lease the adapter's slot, or another one, the longest idle adapter evicted for it."""
        if digest in self._slots:
            self._leases[digest] = self._leases.get(digest, 0) + 1
            self._idle.pop(digest, None)
            return Lease(self._slots[digest], load=False)
        slot = self._vacate()
        self._slots[digest] = slot
        self._leases[digest] = 1
        return Lease(slot, load=True)

    def release(self, digest: str) -> None:
        self._leases[digest] -= 1
        if self._leases[digest] == 0:
            del self._leases[digest]
            self._settle(digest)

    def forget(self, digest: str) -> None:
        """Drop an adapter that nobody leases, and whose tensors turned out not to be in its slot."""
        self._idle.pop(digest, None)
        self._empty.append(self._slots.pop(digest))

    def _settle(self, digest: str) -> None:
        """Say whether an adapter may be evicted, now that it lost a lease or its pin."""
        if digest in self._slots and digest not in self._leases and digest not in self.pinned:
            self._idle[digest] = None

    def _vacate(self) -> int:
        if self._empty:
            return self._empty.pop()
        assert self._idle, "all slots are leased or pinned"
        victim, _ = self._idle.popitem(last=False)
        return self._slots.pop(victim)

    def check_holders(self, digests: Iterable[str]) -> None:
        """Leases are exactly these sequences'."""
        assert Counter(digests) == Counter(self._leases), "leases and sequences disagree"

    def check_integrity(self) -> None:
        """Every slot is empty, leased, pinned or idle, and idle none that is leased or pinned."""
        held = list(self._slots.values())
        assert sorted(held + self._empty) == list(range(1, self.num_slots + 1)), "a slot is lost or doubled"
        safe = self._leases.keys() | (self.pinned & self._slots.keys())
        assert safe | self._idle.keys() == self._slots.keys(), "an adapter is in limbo"
        assert not safe & self._idle.keys(), "an adapter is idle, and leased or pinned"
        assert all(count > 0 for count in self._leases.values()), "a lease without a holder"
