"""What a check remembers: conversations and media that it has seen, in few bytes each (training.digests)."""

from __future__ import annotations

from bisect import bisect

from okavango.modalities.content import Limits, LoadMedia, Media, Modality
from okavango.modalities.encoders import check_medium
from okavango.platform.errors import MediaError
from okavango.training.dataset import Dataset
from okavango.training.digests import Digests
from okavango.training.spread import Spread, Summary

SHOWN = 10
"""So many of the longest rows and of the largest media are named."""
_MOST_VERDICTS = 10_000  # what is wrong with media is remembered for so many, and found anew for others


class Seen:
    """Which conversations stood where first. Passed from file to file, it finds rows that two of them
    share."""

    def __init__(self) -> None:
        self._first = Digests()
        self._files: list[tuple[int, Dataset]] = []  # (number of its first row, file)
        self._rows = 0

    def begin(self, dataset: Dataset) -> None:
        """The rows that come now are this file's."""
        self._files.append((self._rows, dataset))

    def earlier(self, digest: bytes, row: int) -> tuple[Dataset, int] | None:
        """Where a conversation stood before, row from 0; None if it did not."""
        start = self._files[-1][0]
        number = self._first.setdefault(digest, start + row)
        self._rows = start + row + 1
        if number == start + row:
            return None
        begin, dataset = self._files[bisect(self._files, number, key=lambda file: file[0]) - 1]
        return dataset, number - begin


class DecodedMedia:
    """Loads media as training does, and decodes each distinct one once.

    Attributes:
        known: each one's digest → 0 if it is accepted, more if not: its place in `_verdicts`.
        row: the row that is read, from 1.
    """

    def __init__(self, load: LoadMedia, limits: Limits) -> None:
        self.known = Digests()
        self.bytes = 0
        self.row = 0
        self._verdicts: list[str] = []
        self._spreads: dict[Modality, Spread] = {}
        self._limits = limits
        self._load = load

    def load(self, url: str, modality: Modality) -> bytes:
        data = self._load(url, modality)
        key = bytes.fromhex(Media(modality, data).digest)[:16]
        number = self.known.get(key)
        if number is None:
            fault = self._fault_in(data, modality)
            self.known.setdefault(key, self._remember(fault))
            self._count(data, modality)
        elif 0 < number <= len(self._verdicts):
            fault = self._verdicts[number - 1]
        else:
            fault = self._fault_in(data, modality) if number else None
        if fault is not None:
            raise MediaError(fault)
        return data

    def summaries(self) -> dict[str, Summary]:
        found = {name: spread.summary() for name, spread in sorted(self._spreads.items())}
        return {name: summary for name, summary in found.items() if summary is not None}

    def largest(self) -> list[tuple[int, int]]:
        """(bytes, row) of the largest."""
        found = [(each.size, each.row) for spread in self._spreads.values() for each in spread.largest()]
        return sorted(found, key=lambda each: (-each[0], each[1]))[:SHOWN]

    def _remember(self, fault: str | None) -> int:
        if fault is None:
            return 0
        if len(self._verdicts) < _MOST_VERDICTS:
            self._verdicts.append(fault)
            return len(self._verdicts)
        return _MOST_VERDICTS + 1

    def _count(self, data: bytes, modality: Modality) -> None:
        self.bytes += len(data)
        self._spreads.setdefault(modality, Spread(SHOWN)).add(len(data), self.row)

    def _fault_in(self, data: bytes, modality: Modality) -> str | None:
        try:
            check_medium(data, modality, self._limits)
        except MediaError as error:
            return str(error)
        return None
