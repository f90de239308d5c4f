"""Datasets that come as one file: a zip or tar with the rows and the media that they name.

Nothing in an archive is trusted. It is unpacked beside its place and moved there by one rename, into a folder
named by the archive's own digest, so what is there is whole, and is unpacked once.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from pkgutil import resolve_name
from typing import IO, Any, BinaryIO, cast

from okavango.modalities.draft import draft_folder
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_CHUNK = 1 << 20
_SLACK = 1 << 20  # bytes that any archive may become, however small it is
_MOST_HEADER = 1 << 20  # a tar's names and attributes are read at once, by a library that trusts their sizes
_MOST_NAME = 1000
# What macOS and Windows put beside people's files.
_LEAVINGS = re.compile(r"(?:.*/)?(?:__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)")
_STREAMS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may become.

    Attributes:
        files: how many.
        file_bytes, total_bytes: of each, and of all.
        ratio: unpacked bytes a byte of the archive, over all; text seldom shrinks to less than a fiftieth.
    """

    files: int = 200_000
    file_bytes: int = 4 << 30
    total_bytes: int = 16 << 30
    ratio: int = 200


def is_archive(path: Path) -> bool:
    """Whether a file is an archive by its name, or by how it begins."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    with path.open("rb") as file:
        head = file.read(512)
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or _compression(head) is not None or _is_tar(head)


def unpack(path: Path, cache: Path, limits: ArchiveLimits | None = None) -> Path:
    """The folder in `cache` that holds what the archive does.

    Raises:
        DataError: it is damaged, over a limit, or holds what is no plain file inside it.
    """
    digest = file_sha256(path)
    folder = cache / digest[:32]
    if folder.is_dir():
        return folder
    with draft_folder(cache, digest[:32]) as draft:
        if not folder.is_dir():  # another process may have been quicker
            _Unpacking(path, draft, limits or ArchiveLimits()).run()
            draft.rename(folder)
    return folder


class _Unpacking:
    """One archive on its way into a folder."""

    def __init__(self, path: Path, folder: Path, limits: ArchiveLimits) -> None:
        self._path = path
        self._folder = folder
        self._limits = limits
        self._files = 0
        self._bytes = 0
        self._most = min(limits.total_bytes, limits.ratio * path.stat().st_size + _SLACK)

    def run(self) -> None:
        try:
            if zipfile.is_zipfile(self._path):
                self._zip()
            else:
                self._tar()
        except NotImplementedError as error:
            raise self._error(f"is packed in a way that is not read: {error}") from error
        except _DAMAGED as error:
            raise self._error(f"is no whole archive: {error}", "pack it anew as zip or tar.gz") from error

    def _zip(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            for info in archive.infolist():
                mode = info.external_attr >> 16
                if info.is_dir() or _LEAVINGS.fullmatch(info.filename):
                    continue
                if info.flag_bits & 1:
                    raise self._error("is encrypted", "pack it without a password", info.filename)
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise self._no_file(info.filename, "link" if stat.S_ISLNK(mode) else "device")
                self._write(info.orig_filename, info.file_size, partial(archive.open, info))

    def _tar(self) -> None:
        with (
            _tar_stream(self._path, self._most + _MOST_HEADER) as stream,
            tarfile.open(fileobj=cast("BinaryIO", stream), mode="r:") as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # or it keeps all that it has seen
                if member.isdir() or _LEAVINGS.fullmatch(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    is_link = member.issym() or member.islnk()
                    raise self._no_file(member.name, "link" if is_link else "device or a file with holes")
                self._write(member.name, member.size, partial(archive.extractfile, member))

    def _write(self, name: str, size: int, open_member: Callable[[], IO[bytes] | None]) -> None:
        """Copy one file; its declared size is only a hint."""
        self._files += 1
        if self._files > self._limits.files:
            raise self._error(f"holds more than {self._limits.files:,} files")
        self._check_sizes(name, size, self._bytes + size)
        target = self._target(name)
        opened = open_member()
        assert opened is not None  # None for what is no plain file
        with opened as source, target.open("xb") as file:
            written = 0
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                self._check_sizes(name, written, self._bytes + written)
                file.write(chunk)
        self._bytes += written

    def _check_sizes(self, name: str, size: int, total: int) -> None:
        if size > self._limits.file_bytes:
            raise self._error(f"has more than {self._limits.file_bytes:,} bytes", member=name)
        if total > self._limits.total_bytes:
            raise self._error(f"becomes more than {self._limits.total_bytes:,} bytes")
        if total > self._most:
            raise self._error(
                f"becomes more than {self._limits.ratio} times its size, as a decompression bomb does",
                "if it is none, unpack it, and name the folder",
            )

    def _target(self, name: str) -> Path:
        path = PurePosixPath(name)
        odd = not path.parts or len(name) > _MOST_NAME or any(c in name for c in "\\\0:")
        if odd or path.is_absolute() or ".." in path.parts or not name.isprintable():
            raise self._error("would be written outside its folder, or has an odd name", member=name)
        target = self._folder / path
        if target.exists():
            raise self._error("stands twice in the archive", member=name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise self._error("is a file and a folder at once", member=name) from error
        return target

    def _no_file(self, name: str, kind: str) -> DataError:
        return self._error(f"is a {kind}, and only plain files are taken", "pack the file itself", name)

    def _error(self, text: str, remedy: str | None = None, member: str | None = None) -> DataError:
        shown = f"{self._path}: {ascii(member[:200])[1:-1]}" if member is not None else str(self._path)
        return DataError(text, where=shown, remedy=remedy)


class _Metered:
    """A stream that refuses to be read beyond a limit, or in one piece larger than a header may be."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream = stream
        self._most = most

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        # past the end of what may be unpacked lies a file that is too large, and is refused by its size first
        return self._stream.seek(min(offset, self._most) if whence == 0 else offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


@contextmanager
def _tar_stream(path: Path, most: int) -> Iterator[_Metered]:
    with path.open("rb") as file:
        head = file.read(512)
    openers: dict[str | None, Callable[[Path], Any]] = {
        None: lambda path: path.open("rb"),
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
    }
    kind = _compression(head)
    if kind == "zstd":
        openers[kind] = _zstd(path)
    with openers[kind](path) as stream:
        if not _is_tar(stream.read(512)):
            what = f"is packed by {kind}, but holds no tar" if kind else "is no zip and no tar"
            raise DataError(what, where=str(path), remedy="unpack it, or pack it as zip or tar.gz")
        stream.seek(0)
        yield _Metered(stream, most)


def _zstd(path: Path) -> Callable[[Path], Any]:
    if sys.version_info >= (3, 14):
        return cast("Callable[[Path], Any]", resolve_name("compression.zstd:open"))
    raise DataError(
        "zstd is read from Python 3.14 on", where=str(path), remedy="pack it as zip, tar.gz or tar.xz"
    )


def _compression(head: bytes) -> str | None:
    return next((name for magic, name in _STREAMS if head.startswith(magic)), None)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"
