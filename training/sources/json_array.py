"""A JSON array of rows. It is never parsed as a whole: one pass over its bytes finds where elements start,
which takes 8 bytes a row, and each is parsed when it is asked for."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from okavango.modalities.content import Limits
from okavango.training.rows import parse_row, row_bytes
from okavango.training.sources.source import Location, Raw

_CHUNK = 1 << 20
# Everything up to what counts: strings whole, so that brackets in them do not. At the top, commas part rows.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)
_TO_COMMA = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+", re.DOTALL)
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_CLOSED_BY = {ord("["): ord("]"), ord("{"): ord("}")}


class JsonArray:
    """See Source."""

    columns = None

    def __init__(self, path: Path, limits: Limits) -> None:
        self.folder = path.parent
        self.size = path.stat().st_size
        self._path = path
        self._limits = limits
        self._scan = _Scan(path)
        self._counted = (0, 1)  # (offset, its line): lines are counted on from there

    def __len__(self) -> int:
        return len(self._scan.starts)

    def row(self, i: int) -> Raw:
        with self._path.open("rb") as file:
            return self._read(file, i)

    def rows(self) -> Iterator[tuple[Raw, int]]:
        with self._path.open("rb") as file:
            for i in range(len(self)):
                yield self._read(file, i), self._end(i) + 1

    def location(self, i: int) -> Location:
        start = self._scan.starts[i]
        with self._path.open("rb") as file:
            file.seek(start)
            blank = file.read(min(self._end(i) - start, _CHUNK))
        return Location(i + 1, self._line_at(start + len(blank) - len(blank.lstrip())))

    def fault(self) -> str | None:
        if self._scan.broken_at is None:
            return None
        what, offset = self._scan.broken_at
        return f"{what} in line {self._line_at(offset):,}; the rows after that cannot be told apart"

    def sha256(self) -> Any:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")

    def _read(self, file: BinaryIO, i: int) -> Raw:
        start = self._scan.starts[i]
        file.seek(start)
        data = file.read(min(self._end(i) - start, row_bytes(self._limits) + _CHUNK))
        return parse_row(data.strip(b" \t\r\n"), self._limits, "row")

    def _end(self, i: int) -> int:
        """Where row i's comma or the array's bracket stands."""
        starts = self._scan.starts
        return starts[i + 1] - 1 if i + 1 < len(starts) else self._scan.end

    def _line_at(self, offset: int) -> int:
        at, line = self._counted if self._counted[0] <= offset else (0, 1)
        with self._path.open("rb") as file:
            file.seek(at)
            while at < offset and (chunk := file.read(min(_CHUNK, offset - at))):
                line += chunk.count(b"\n")
                at += len(chunk)
        self._counted = (at, line)
        return line


class _Scan:
    """Where an array's elements lie.

    Attributes:
        starts: of each element, after the bracket or comma.
        end: of the last one.
        broken_at: (what, offset) that makes the file no array.
    """

    def __init__(self, path: Path) -> None:
        self.starts = array("Q")
        self.end = 0
        self.broken_at: tuple[str, int] | None = None
        self._open = bytearray()  # the brackets that are open
        self._in_string = False
        self._filled = False  # whether the last element holds anything
        with path.open("rb") as file:
            self._read(file)

    def _read(self, file: BinaryIO) -> None:
        rest, offset = b"", 0  # what could not be judged without what follows, and where it starts
        while chunk := file.read(_CHUNK):
            data = rest + chunk
            used = self._take(data, offset)
            rest, offset = data[used:], offset + used
            if self.broken_at is not None:
                return
        end = offset + len(rest)
        if self._open or self._in_string:
            if not self._filled:
                self.starts.pop()  # nothing came after the bracket or comma
            self._break("the array is not closed", end)
        elif not self.starts and not self.end:
            self._break("there is no array", end)

    def _take(self, data: bytes, offset: int) -> int:
        """Go through data that stand at `offset`; how many bytes are done with."""
        at = 0
        while at < len(data) and self.broken_at is None:
            if self._in_string:
                at = _end_of(_IN_STRING, data, at)
                if at == len(data) or data[at] != ord('"'):
                    return at  # the end, or a backslash whose character is yet to come
                self._in_string, at = False, at + 1
                continue
            if not self._open:
                at = self._outside(data, at, offset)
                continue
            before = at
            at = _end_of(_TO_COMMA if len(self._open) == 1 else _TO_BRACKET, data, at)
            self._filled = self._filled or (not data[before:at].isspace() and at > before)
            if at < len(data):
                self._mark(data[at], offset + at)
                at += 1
        return at

    def _outside(self, data: bytes, at: int, offset: int) -> int:
        """Before the array, or behind it."""
        at += len(data[at:]) - len(data[at:].lstrip(b" \t\r\n"))
        if at == len(data):
            return at
        if data[at] != ord("[") or self.end:
            self._break("more follows the array" if self.end else "there is no array", offset + at)
            return at
        self._open.append(data[at])
        self.starts.append(offset + at + 1)
        return at + 1

    def _mark(self, mark: int, offset: int) -> None:
        """A quote that is not closed in these data, a bracket, or a comma between elements."""
        match chr(mark):
            case '"':
                self._in_string = self._filled = True
            case ",":
                self.starts.append(offset + 1)
                self._filled = False
            case "[" | "{":
                self._open.append(mark)
                self._filled = True
            case _:
                self._close(mark, offset)

    def _close(self, mark: int, offset: int) -> None:
        if _CLOSED_BY[self._open[-1]] != mark:
            self.end = offset
            self._break(f"{chr(self._open[-1])} is closed by {chr(mark)}", offset)
            return
        self._open.pop()
        if not self._open:
            self.end = offset
            if not self._filled and len(self.starts) == 1:
                self.starts.pop()  # []

    def _break(self, what: str, offset: int) -> None:
        self.broken_at = what, offset
        self.end = self.end or offset


def _end_of(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    match = pattern.match(data, at)
    assert match is not None  # all of them match nothing, too
    return match.end()
