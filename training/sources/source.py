"""What every source of rows offers: a file's lines, an array's elements, a table's rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

HUB = "hub:"


def is_hub(path: Path | str) -> bool:
    """Whether data are named by their place on the Hugging Face hub."""
    return str(path).startswith(HUB)


class Raw(NamedTuple):
    """A row as its file has it, in JSON's values and bytes; or what keeps it from being read."""

    value: Any
    fault: str | None = None


@dataclass(frozen=True)
class Location:
    """A row's place in its file, counted from 1; `line` is where it begins, None where there are no lines."""

    row: int
    line: int | None

    def within(self, path: Path) -> str:
        """The place as file:line, and the row's number where that is another."""
        place = f"{path}:{self.line}" if self.line is not None else str(path)
        return place if self.row == self.line else f"{place}: row {self.row}"


class Source(Protocol):
    """Rows of a file, or of a dataset of several. Media that they name lie below `folder`.

    Attributes:
        size: in bytes, as progress counts them.
        columns: a table's; rows of JSON have keys of their own each.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def size(self) -> int: ...

    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def row(self, i: int) -> Raw:
        """Row i, counted from 0, with no more in memory than its neighbourhood."""

    def rows(self) -> Iterator[tuple[Raw, int]]:
        """All rows in order, in one pass, each with the bytes that are done after it."""

    def location(self, i: int) -> Location: ...

    def fault(self) -> str | None:
        """What is wrong with the file as a whole beside its rows."""

    def sha256(self) -> Any:
        """A hash object that has seen the file's bytes; of a dataset of several files, only its name."""
