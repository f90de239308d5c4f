"""JSONL datasets: one conversation a line, read one at a time, media only when a row is asked for.

Media are data URLs, or, in files of this machine, paths relative to the JSONL that stay inside its folder.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from okavango.modalities.content import Limits, LoadMedia, Message, Modality, data_url_bytes
from okavango.platform.errors import DataError, MediaError
from okavango.training.rows import read_line, read_row

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Example:
    """A row: its conversation, and the line (from 1) that it stands on."""

    messages: tuple[Message, ...]
    line: int


class Dataset:
    """A JSONL file whose lines are found once and read when asked for: 8 bytes a row stay in memory.

    Args:
        path: the file.
        allow_files: whether media may be paths; uploads may hold data URLs only.
    """

    def __init__(self, path: Path, *, allow_files: bool, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self._load_media = media_loader(path.parent, allow_files=allow_files, limits=limits)
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, i: int) -> Example:
        """Row i, parsed, its media read and not decoded.

        Raises:
            DataError: the row is not as `okavango data check` wants it, with every fault in it.
        """
        messages, faults = read_row(self.line(i), self._load_media, self.limits)
        if faults:
            raise DataError(
                str(faults[0]),
                tuple(f"{self.path}:{i + 1}: {fault}" for fault in faults),
                where=f"{self.path}:{i + 1}",
            )
        return Example(messages, i + 1)

    def rows(self) -> Iterator[Example]:
        return (self.row(i) for i in range(len(self)))

    def line(self, i: int) -> bytes:
        """Line i as it stands in the file, without its end."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[i])
            return read_line(file, self.limits).rstrip(b"\r\n")

    @cached_property
    def digest(self) -> str:
        """sha256 over the file and, in order, the digest of every medium that it names."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        for example in self.rows():
            for message in example.messages:
                for medium in message.media:
                    digest.update(medium.digest.encode())
        return digest.hexdigest()


def open_dataset(path: Path, *, allow_files: bool = True, limits: Limits | None = None) -> Dataset:
    """Open a JSONL file.

    Raises:
        DataError: there is no such file, or it holds nothing.
    """
    path = Path(path)
    fault = file_fault(path)
    if fault:
        raise DataError(fault, where=str(path))
    return Dataset(path.absolute(), allow_files=allow_files, limits=limits or Limits())


def file_fault(path: Path) -> str | None:
    """What keeps a path from being a data file, before any line is read."""
    if not path.exists():
        return "there is no such file"
    if not path.is_file():
        return "is not a file"
    try:
        with path.open("rb") as file:
            return None if file.read(1) else "the file is empty"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def media_loader(folder: Path, *, allow_files: bool, limits: Limits) -> LoadMedia:
    """How a data file's media are read: data URLs, and files below `folder` if they are allowed."""
    root = folder.resolve()

    def load(url: str, modality: Modality) -> bytes:
        if url.startswith("data:") or not allow_files:
            return data_url_bytes(url, modality)
        scheme = _SCHEME.match(url)
        if scheme:
            raise MediaError(
                f"only data URLs and relative paths are accepted, not {scheme[0]}",
                remedy="store the file in the data file's folder, and name it relative to that",
            )
        return _read_inside(root, url, limits)

    return load


def _read_inside(root: Path, name: str, limits: Limits) -> bytes:
    shown = repr(name if len(name) <= 200 else f"{name[:200]}…")
    try:
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise MediaError(
                f"{shown} lies outside the data file's folder", remedy="store it there; links count, too"
            )
        if not path.exists():
            raise MediaError(f"there is no file {shown} in the data file's folder")
        if not path.is_file():
            raise MediaError(f"{shown} is not a file")
        if path.stat().st_size > limits.media_bytes:
            raise MediaError(
                f"{shown} has {path.stat().st_size:,} bytes, over the limit of {limits.media_bytes:,}"
            )
        return path.read_bytes()
    except MediaError:
        raise
    # RuntimeError: a loop of links. ValueError: a NUL, or characters that no file name has.
    except (OSError, RuntimeError, ValueError) as error:
        raise MediaError(f"{shown} cannot be read: {error}") from error


def _line_offsets(path: Path) -> array[int]:
    """Where each line starts. Reads by the chunk, since a file that is no JSONL may be one endless line."""
    offsets = array("Q")
    position, starts_line = 0, True
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if starts_line:
                offsets.append(position)
            offsets.extend(position + match.end() for match in re.finditer(rb"\n(?!\Z)", chunk))
            starts_line = chunk.endswith(b"\n")
            position += len(chunk)
    return offsets
