"""How sizes are spread, in bounded memory: counts by size, of which three digits are kept."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

_DIGITS = 3
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}


@dataclass(frozen=True)
class Summary:
    """Sizes of many things: `p50` to `p99` within half a percent, the others exact."""

    count: int
    total: int
    p50: int
    p90: int
    p99: int
    largest: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, order=True)
class Large:
    """One of the largest: its size, a second size that goes with it, and its row from 1."""

    size: int
    other: int
    row: int


class Spread:
    """Sizes as they come: at most 900 counts for each power of ten.

    Args:
        keep: how many of the largest are kept as they are.
    """

    def __init__(self, keep: int = 0) -> None:
        self._counts: Counter[int] = Counter()
        self._total = 0
        self._largest = 0
        self._keep = keep
        self._heap: list[Large] = []

    def add(self, size: int, row: int, other: int = 0) -> None:
        self._counts[_rounded(size)] += 1
        self._total += size
        self._largest = max(self._largest, size)
        if len(self._heap) < self._keep:
            heapq.heappush(self._heap, Large(size, other, -row))
        elif self._heap and Large(size, other, -row) > self._heap[0]:
            heapq.heapreplace(self._heap, Large(size, other, -row))

    def summary(self) -> Summary | None:
        """None where there was nothing."""
        if not self._counts:
            return None
        count = self._counts.total()
        found: dict[str, Any] = {name: self._at(count * share / 100) for name, share in _PERCENTILES.items()}
        return Summary(count=count, total=self._total, largest=self._largest, **found)

    def largest(self) -> list[Large]:
        """Those that are kept, the largest first, of equals the earliest."""
        return [Large(each.size, each.other, -each.row) for each in sorted(self._heap, reverse=True)]

    def _at(self, rank: float) -> int:
        passed = 0
        for size in sorted(self._counts):
            passed += self._counts[size]
            if passed >= rank:
                return min(size, self._largest)
        raise AssertionError(rank)


def _rounded(size: int) -> int:
    """The size with its first three digits, so that sizes have no more counts than there are such numbers."""
    if size < 10**_DIGITS:
        return size
    scale: int = 10 ** (len(str(size)) - _DIGITS)
    return round(size / scale) * scale
