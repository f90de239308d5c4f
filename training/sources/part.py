"""Some of a source's rows: what is learned from, and what is held out of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from okavango.platform.errors import DataError
from okavango.training.sources.source import Location, Raw, Source


def parted(count: int, share: float, seed: int) -> tuple[array[int], array[int]]:
    """Of so many rows, numbers of those to learn from and of those to hold out: each in order, each at least
    one, drawn by the seed alone.

    Raises:
        DataError: there are fewer than two.
    """
    if count < 2:
        raise DataError(
            f"of {count} rows none can be held out", where="hold_out", remedy="leave it out, or bring more"
        )
    size = min(max(1, round(count * share)), count - 1)
    held_out = set(random.Random(f"hold out {seed}").sample(range(count), size))
    return array("q", (i for i in range(count) if i not in held_out)), array("q", sorted(held_out))


class Part:
    """See Source. Rows keep their places in the whole.

    Args:
        rows: which ones, counted from 0, in order.
    """

    def __init__(self, whole: Source, rows: array[int]) -> None:
        self._whole = whole
        self._rows = rows

    @property
    def folder(self) -> Path:
        return self._whole.folder

    @property
    def size(self) -> int:
        return self._whole.size

    @property
    def columns(self) -> tuple[str, ...] | None:
        return self._whole.columns

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Raw:
        return self._whole.row(self._rows[i])

    def rows(self) -> Iterator[tuple[Raw, int]]:
        wanted = iter(self._rows)
        following = next(wanted, None)
        for i, found in enumerate(self._whole.rows()):
            if i == following:
                yield found
                following = next(wanted, None)

    def location(self, i: int) -> Location:
        return self._whole.location(self._rows[i])

    def fault(self) -> str | None:
        return self._whole.fault()

    def sha256(self) -> Any:
        """Of the whole and of which rows, so that parts of one file are datasets of their own."""
        digest = self._whole.sha256()
        if digest is not None:
            digest.update(str(self._rows.tolist()).encode())
        return digest
