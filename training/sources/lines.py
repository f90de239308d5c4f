"""JSON Lines: one row a line. 8 bytes a row stay in memory, and only if rows are asked for by number."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from okavango.modalities.content import Limits
from okavango.training.rows import parse_row, row_bytes
from okavango.training.sources.source import Location, Raw

_CHUNK = 1 << 20


class Lines:
    """See Source."""

    columns = None

    def __init__(self, path: Path, limits: Limits) -> None:
        self.folder = path.parent
        self.size = path.stat().st_size
        self._path = path
        self._limits = limits

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, i: int) -> Raw:
        with self._path.open("rb") as file:
            file.seek(self._offsets[i])
            return self._parse(_read_line(file, self._limits))

    def rows(self) -> Iterator[tuple[Raw, int]]:
        with self._path.open("rb") as file:
            done = 0
            while line := _read_line(file, self._limits):
                done = done + len(line) if line.endswith(b"\n") else file.tell()
                yield self._parse(line), done

    def location(self, i: int) -> Location:
        return Location(i + 1, i + 1)

    def fault(self) -> str | None:
        return None

    def sha256(self) -> Any:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")

    def _parse(self, line: bytes) -> Raw:
        return parse_row(line.rstrip(b"\r\n"), self._limits)

    @cached_property
    def _offsets(self) -> array[int]:
        """Where each line starts. Reads by the chunk: a file that is no JSONL may be one endless line."""
        offsets = array("Q")
        position, starts_line = 0, True
        with self._path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if starts_line:
                    offsets.append(position)
                offsets.extend(position + match.end() for match in re.finditer(rb"\n(?!\Z)", chunk))
                starts_line = chunk.endswith(b"\n")
                position += len(chunk)
        return offsets


def _read_line(file: BinaryIO, limits: Limits) -> bytes:
    """The next line with its end, or b"" at the file's end. Of a line that is too long, just so much that
    its parser says so; the file then stands behind it."""
    line = piece = file.readline(row_bytes(limits) + 3)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(_CHUNK)
    return line
