"""What a check of data finds: each fault with its place, and what the data hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from okavango.platform.errors import DataError
from okavango.training.memory import Estimate
from okavango.training.sources.source import Location
from okavango.training.spread import Summary


@dataclass(frozen=True)
class Finding:
    """A fault or a warning and its place. `row` and `line` count from 1; `line` is None where there are no
    lines, both are for the data as a whole. `field` is a path such as messages[1].content, in terms of the
    row's own format, and "" for the row as a whole."""

    path: Path
    line: int | None
    field: str
    text: str
    row: int | None = None

    def __str__(self) -> str:
        place = Location(self.row, self.line).within(self.path) if self.row else str(self.path)
        return ": ".join(part for part in (place, self.field, self.text) if part)

    def to_json(self) -> dict[str, Any]:
        place = {"file": str(self.path), "line": self.line, "row": self.row}
        return {**place, "field": self.field, "text": self.text}


@dataclass(frozen=True)
class Place:
    """A row and its size: tokens of a long one, or bytes of a medium in it."""

    row: int
    line: int | None
    size: int


@dataclass
class Counts:
    """What was found in a file; tokens only where a base measured them.

    Attributes:
        media_bytes: of distinct media, encoded.
        answer_chars: of all assistants' texts.
        longest: tokens of the longest row.
    """

    rows: int = 0
    faulty_rows: int = 0
    messages: int = 0
    media: int = 0
    distinct_media: int = 0
    media_bytes: int = 0
    answer_chars: int = 0
    tokens: int = 0
    longest: int = 0
    faults: int = 0
    warnings: int = 0


@dataclass(frozen=True)
class Report:
    """The result. `counts` counts all; of faults and warnings the first `keep` are held.

    Attributes:
        format: as which the rows were read.
        tokens: of a row, where a base measured them.
        longest: the longest rows, where a base measured them.
        media: encoded bytes of distinct media by modality, and the largest of them.
        memory: what a batch of the longest rows takes, where a base measured them.
    """

    path: Path
    counts: Counts
    faults: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    format: str | None = None
    tokens: Summary | None = None
    longest: tuple[Place, ...] = ()
    media: Mapping[str, Summary] = field(default_factory=dict)
    largest_media: tuple[Place, ...] = ()
    memory: Estimate | None = None

    @property
    def ok(self) -> bool:
        return self.counts.faults == 0

    def require_ok(self) -> None:
        """Raises DataError with the faults that are held, if there are any."""
        if not self.ok:
            raise DataError(
                f"{self.counts.faults:,} faults",
                tuple(map(str, self.faults)),
                where=str(self.path),
                remedy="correct them, and check with: okavango data check",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "ok": self.ok,
            "format": self.format,
            "counts": asdict(self.counts),
            "tokens": self.tokens.to_json() if self.tokens else None,
            "longest_rows": [asdict(place) for place in self.longest],
            "media": {modality: summary.to_json() for modality, summary in self.media.items()},
            "largest_media": [asdict(place) for place in self.largest_media],
            "memory": self.memory.to_json() if self.memory else None,
            "faults": [finding.to_json() for finding in self.faults],
            "warnings": [finding.to_json() for finding in self.warnings],
        }
