"""Datasets: one conversation a row, read one at a time, media only when a row is asked for.

Where rows lie and how they are written, training.sources and training.formats know; from here on all are
alike. Media are data URLs, bytes in a table, or, in data of this machine and in archives, paths relative to
the data file that stay inside its folder.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path

from okavango.modalities.content import Limits, LoadMedia, Media, Message, Modality, data_url_bytes
from okavango.platform.config import load_settings
from okavango.platform.errors import DataError, MediaError
from okavango.platform.stored import is_file_id
from okavango.training.archives import ArchiveLimits
from okavango.training.formats.detect import FORMATS, LOOKED_AT, Format, detect, named_format
from okavango.training.formats.normal import Embedded
from okavango.training.rows import RowReader
from okavango.training.sources.open import Opened, open_source
from okavango.training.sources.part import Part, parted
from okavango.training.sources.source import Source

_MISSPELT = 0.8  # how alike two names are then, as difflib has it
ReadUpload = Callable[[str, int], bytes]
"""(id, most bytes) → an uploaded file's bytes. Raises MediaError where there is none, or it is larger."""

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


@dataclass(frozen=True)
class Example:
    """A row: its conversation, and its number in the file, from 1. In JSON Lines that is its line."""

    messages: tuple[Message, ...]
    line: int


@dataclass(frozen=True)
class Dataset:
    """Rows found once and read when asked for: a few bytes a row stay in memory.

    Attributes:
        path: of the file, as reports name it.
        source: the rows as they lie there.
        reader: what brings them into one form.
        numbers: rows' numbers in the file, from 0, where the dataset is a part of it.
    """

    path: Path
    source: Source
    reader: RowReader
    numbers: array[int] | None = None

    @property
    def limits(self) -> Limits:
        return self.reader.limits

    @property
    def format(self) -> str:
        return self.reader.form.name

    def __len__(self) -> int:
        return len(self.source)

    def row(self, i: int) -> Example:
        """Row i, its media read and not decoded.

        Raises:
            DataError: the row is not as `okavango data check` wants it, with every fault in it.
        """
        messages, faults = self.reader.read(self.source.row(i))
        if faults:
            where = self.where(i)
            raise DataError(str(faults[0]), tuple(f"{where}: {fault}" for fault in faults), where=where)
        return Example(messages, (i if self.numbers is None else self.numbers[i]) + 1)

    def rows(self) -> Iterator[Example]:
        return (self.row(i) for i in range(len(self)))

    def where(self, i: int) -> str:
        """Row i's place, for people."""
        return self.source.location(i).within(self.path)

    def names(self, i: int) -> list[str]:
        """What row i calls its media, without folders; those that are data URLs have no name."""
        return self.reader.names(self.source.row(i))

    def parted(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """What is learned from, and what is held out: that share of the rows.

        Raises:
            DataError: there are fewer than two rows.
        """
        kept, held_out = parted(len(self), share, seed)
        return self._part(kept), self._part(held_out)

    def _part(self, rows: array[int]) -> Dataset:
        return replace(self, source=Part(self.source, rows), numbers=rows)

    @cached_property
    def digest(self) -> str:
        """sha256 over the file and, in order, the digest of every medium that its rows name; of a dataset of
        several files, over the conversations. Rows read as another format make another dataset."""
        digest = self.source.sha256()
        in_one_file = digest is not None
        digest = digest or hashlib.sha256()
        if self.format != "openai":
            digest.update(self.format.encode())
        for example in self.rows():
            if not in_one_file:
                digest.update(identity(example.messages))
            for message in example.messages:
                for medium in message.media:
                    digest.update(medium.digest.encode())
        return str(digest.hexdigest())


def open_dataset(
    path: Path,
    *,
    form: str | None = None,
    allow_files: bool = True,
    uploads: ReadUpload | None = None,
    limits: Limits | None = None,
    cache: Path | None = None,
    archive_limits: ArchiveLimits | None = None,
) -> Dataset:
    """Open data; see training.sources.open for what they may be.

    Args:
        form: the rows' format (training.formats); found out from the first rows if not named.
        allow_files: whether media may be paths; uploads may hold data URLs only, or be archives.
        uploads: reads media that rows name by the id of an uploaded file; None where there are none.
        cache: where archives are unpacked, and tables kept as Arrow; the settings' if not given.

    Raises:
        DataError: there are no such data, or they cannot be read.
        ConfigError: there is no such format.
    """
    limits = limits or Limits()
    named = named_format(form) if form is not None else None
    opened = open_source(
        Path(path),
        allow_files=allow_files,
        limits=limits,
        cache=cache or load_settings().data,
        archive_limits=archive_limits,
    )
    chosen = named or _detected(opened)
    reader = RowReader(
        chosen,
        media_loader(opened.source.folder, allow_files=opened.allow_files, limits=limits, uploads=uploads),
        limits,
        _unused(opened.source, chosen),
        named is not None,
    )
    return Dataset(opened.path, opened.source, reader)


def identity(messages: tuple[Message, ...]) -> bytes:
    """16 bytes of what makes two conversations the same: roles, texts, and media by content."""
    digest = hashlib.sha256()
    for message in messages:
        parts = [part.digest if isinstance(part, Media) else part.text for part in message.parts]
        digest.update(repr((message.role, parts)).encode())
    return digest.digest()[:16]


def media_loader(
    folder: Path, *, allow_files: bool, limits: Limits, uploads: ReadUpload | None = None
) -> LoadMedia:
    """How a data file's media are read: data URLs, uploaded files by their ids where there are uploads, and
    files below `folder` if they are allowed."""
    root = folder.resolve()

    def load(url: str, modality: Modality) -> bytes:
        if isinstance(url, Embedded):
            return url.data
        if uploads is not None and is_file_id(url):
            return uploads(url, limits.media_bytes)
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


def _detected(opened: Opened) -> Format:
    """The rows' format. Where no row tells, they are read as OpenAI's, and each says what it misses; a table
    says it once."""
    columns = opened.source.columns
    found = detect(raw.value for raw, _ in islice(opened.source.rows(), LOOKED_AT))
    if found is not None or columns is None:
        return found or FORMATS["openai"]
    needed = "; ".join(f"{name}: {', '.join(each.needed)}" for name, each in FORMATS.items())
    raise DataError(
        f"its columns are of no known format: {', '.join(columns)}",
        where=str(opened.path),
        remedy=f"rename them ({needed})",
    )


def _unused(source: Source, form: Format) -> frozenset[str]:
    """A table's columns that rows of a format do not have. One that looks misspelt is not among them, and so
    is a fault of every row."""
    near = [key for key in form.keys if key != "id"]
    return frozenset(
        name
        for name in source.columns or ()
        if name not in form.keys and not get_close_matches(name, near, n=1, cutoff=_MISSPELT)
    )


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
