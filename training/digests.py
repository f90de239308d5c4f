"""A map from 16-byte digests to small numbers in little memory: what a check of millions of rows remembers.

An open hash table of fixed records. A slot takes 20 bytes, and between a third and two thirds of them are
filled: 30 to 60 bytes an entry, half as much again for the moment in which it grows. A dict takes 150.
"""

from __future__ import annotations

from array import array

WIDTH = 16
_EMPTY = 0
MOST = (1 << 32) - 2
"""The largest number that an entry may have."""


class Digests:
    """Digests in, numbers out. Digests are taken for random: their first bytes choose the slot."""

    def __init__(self) -> None:
        self._count = 0
        self._make(1 << 10)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return len(self._keys) + self._numbers.itemsize * len(self._numbers)

    def get(self, digest: bytes) -> int | None:
        number = self._numbers[self._slot(digest)]
        return None if number == _EMPTY else number - 1

    def setdefault(self, digest: bytes, number: int) -> int:
        """The number of a digest; `number`, from now on, if it had none."""
        slot = self._slot(digest)
        found = self._numbers[slot]
        if found != _EMPTY:
            return found - 1
        self._put(slot, digest, number + 1)
        self._count += 1
        if 3 * self._count > 2 * len(self._numbers):
            self._grow()
        return number

    def check_integrity(self) -> None:
        """Every entry is found from where its digest begins."""
        filled = [slot for slot, number in enumerate(self._numbers) if number != _EMPTY]
        assert len(filled) == self._count
        for slot in filled:
            assert self._slot(bytes(self._keys[WIDTH * slot : WIDTH * slot + WIDTH])) == slot

    def _slot(self, digest: bytes) -> int:
        """Where a digest is, or would be."""
        assert len(digest) == WIDTH
        slot = int.from_bytes(digest[:8], "big") & self._mask
        while self._numbers[slot] != _EMPTY and self._keys[WIDTH * slot : WIDTH * slot + WIDTH] != digest:
            slot = (slot + 1) & self._mask
        return slot

    def _put(self, slot: int, digest: bytes, stored: int) -> None:
        self._keys[WIDTH * slot : WIDTH * slot + WIDTH] = digest
        self._numbers[slot] = stored

    def _make(self, slots: int) -> None:
        self._mask = slots - 1
        self._keys = bytearray(WIDTH * slots)
        self._numbers = array("I", bytes(4 * slots))

    def _grow(self) -> None:
        keys, numbers = self._keys, self._numbers
        self._make(2 * len(numbers))
        for slot, stored in enumerate(numbers):
            if stored != _EMPTY:
                digest = bytes(keys[WIDTH * slot : WIDTH * slot + WIDTH])
                self._put(self._slot(digest), digest, stored)
