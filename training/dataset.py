"""JSONL datasets: one conversation a line, read one at a time, media only when a row is asked for.

Media are data URLs, or, in files of this machine, paths relative to the JSONL that stay inside its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from okavango.modalities.content import (
    Limits,
    LoadMedia,
    Message,
    Modality,
    data_url_bytes,
    parse_messages,
)
from okavango.platform.errors import DataError, MediaError, PromptError

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


@dataclass(frozen=True)
class Example:
    """A row: its conversation, and the line (from 1) that it stands on."""

    messages: tuple[Message, ...]
    line: int


class Dataset:
    """A JSONL file whose lines are found once and read when asked for.

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
            DataError: the row is not as `okavango data check` wants it, with file, line and field.
        """
        where = f"{self.path}:{i + 1}"
        try:
            raw = json.loads(self.line(i))
            messages = raw["messages"] if isinstance(raw, dict) else None
            return Example(parse_messages(messages, self._load_media, self.limits), i + 1)
        except PromptError as error:
            raise DataError(str(error), where=where) from error
        except (ValueError, KeyError) as error:
            raise DataError(f"not a row: {error!r}", where=where) from error

    def rows(self) -> Iterator[Example]:
        return (self.row(i) for i in range(len(self)))

    def line(self, i: int) -> bytes:
        """Line i as it stands in the file, without its end."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[i])
            return file.readline().rstrip(b"\r\n")

    @cached_property
    def digest(self) -> str:
        """sha256 over the file and, in order, the digest of every medium that it names."""
        digest = hashlib.sha256(self.path.read_bytes())
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
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    dataset = Dataset(path.absolute(), allow_files=allow_files, limits=limits or Limits())
    if len(dataset) == 0:
        raise DataError("the file is empty", where=str(path))
    return dataset


def media_loader(folder: Path, *, allow_files: bool, limits: Limits) -> LoadMedia:
    """How a data file's media are read: data URLs, and files below `folder` if they are allowed."""
    root = folder.resolve()

    def load(url: str, modality: Modality) -> bytes:
        if url.startswith("data:") or not allow_files:
            return data_url_bytes(url, modality)
        if _SCHEME.match(url):
            scheme = url.split(":", 1)[0]
            raise MediaError(
                f"only data URLs and relative paths are accepted, not {scheme}:",
                remedy="store the file beside",
            )
        return _read_inside(root, url, limits)

    return load


def _read_inside(root: Path, name: str, limits: Limits) -> bytes:
    if not name or "\0" in name:
        raise MediaError(f"{name!r} is no path")
    try:
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise MediaError(f"{name!r} lies outside the data file's folder")
        if not path.is_file():
            raise MediaError(f"there is no file {name!r} beside the data file")
        if path.stat().st_size > limits.media_bytes:
            raise MediaError(f"{name!r} has {path.stat().st_size:,} bytes, over {limits.media_bytes:,}")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise MediaError(f"{name!r} cannot be read: {error}") from error


def _line_offsets(path: Path) -> list[int]:
    offsets, position = [], 0
    with path.open("rb") as file:
        for line in file:
            offsets.append(position)
            position += len(line)
    return offsets
