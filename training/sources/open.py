"""A place where data lie → a source of rows.

    train.jsonl  rows.json  rows.parquet  rows.csv  rows.arrow     a file
    shop.zip  shop.tar.gz  shop.zip#train.jsonl                    an archive, and one of several files in it
    folder  folder#train.jsonl  folder#train                       a folder; one of its files or splits
    hub:owner/name  hub:owner/name/configuration#train             a dataset of the Hugging Face hub

The suffix says what a file is; where it says nothing (an upload's name may have none), its first bytes do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.content import Limits
from okavango.platform.errors import DataError
from okavango.training.archives import ArchiveLimits, is_archive, unpack
from okavango.training.sources.json_array import JsonArray
from okavango.training.sources.lines import Lines
from okavango.training.sources.source import HUB, Source, is_hub
from okavango.training.sources.table import BUILDERS, file_table, folder_table, hub_table

_JSON = (".jsonl", ".ndjson", ".json")
_DATA = (*_JSON, *BUILDERS)
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_SAVED = ("state.json", "dataset_dict.json")
# Of the builders of `datasets` that read a folder of media with a table beside them.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Beside a dataset's rows lie files that are none.
_NO_ROWS = frozenset(("dataset.json", "dataset_info.json", "dataset_infos.json", *_SAVED))


@dataclass(frozen=True)
class Opened:
    """`path`: as a report names it. `allow_files`: whether rows may name media by path."""

    source: Source
    path: Path
    allow_files: bool


def open_source(
    path: Path, *, allow_files: bool, limits: Limits, cache: Path, archive_limits: ArchiveLimits | None = None
) -> Opened:
    """Open data for reading; nothing but what finds the rows is read.

    Args:
        allow_files: whether rows may name files, and `path` a folder or the hub; an archive's rows may name
            files of the archive always.
        cache: where archives are unpacked, and tables kept as Arrow.

    Raises:
        DataError: there are no data, or not such that they can be read.
    """
    if is_hub(path) and allow_files:
        name, _, split = str(path).removeprefix(HUB).partition("#")
        return Opened(hub_table(name, split or None, cache / "tables"), path, allow_files)
    path, part = _parted(path)
    if not path.exists():
        raise DataError("there is no such file", where=str(path))
    if path.is_dir() and allow_files:
        return _open_folder(path, part, limits, cache)
    _check_file(path)
    if path.suffix.lower() not in _DATA and is_archive(path):
        folder = unpack(path, cache / "archives", archive_limits)
        file = _chosen(folder, part, path)
        shown = Path(f"{path}#{file.relative_to(folder).as_posix()}")
        return Opened(_open_file(file, limits, cache, shown, trusted=allow_files), shown, True)
    if part is not None:
        raise DataError(f"is no archive, so it holds no {part!r}", where=str(path))
    return Opened(_open_file(path, limits, cache, path, trusted=allow_files), path, allow_files)


def _parted(path: Path) -> tuple[Path, str | None]:
    """A path, and what follows its last #, unless a file has that in its name."""
    whole, mark, part = str(path).rpartition("#")
    return (Path(whole), part) if mark and not path.exists() else (path, None)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError("is not a file", where=str(path))
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if empty:
        raise DataError("the file is empty", where=str(path))


def _open_folder(folder: Path, part: str | None, limits: Limits, cache: Path) -> Opened:
    if part is not None and (folder / part).is_file():
        file = _chosen(folder, part, folder)
        shown = Path(f"{folder}#{part}")
        return Opened(_open_file(file, limits, cache, shown), shown, True)
    if any((folder / name).is_file() for name in (*_SAVED, *_METADATA)) or not _rows_in(folder, _JSON):
        shown = Path(f"{folder}#{part}") if part else folder
        return Opened(folder_table(folder, part, cache / "tables"), shown, True)
    file = _chosen(folder, part, folder)
    return Opened(_open_file(file, limits, cache, file), file, True)


def _chosen(folder: Path, part: str | None, shown: Path) -> Path:
    """The data file of a folder or archive."""
    if part is not None:
        file = (folder / part).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise DataError(f"holds no file {part!r}", where=str(shown), remedy=_choice(folder, shown))
        return folder / part
    files = _rows_in(folder, _DATA)
    if len(files) != 1:
        problem = "holds several data files" if files else "holds no data file"
        raise DataError(problem, where=str(shown), remedy=_choice(folder, shown))
    return files[0]


def _choice(folder: Path, shown: Path) -> str:
    files = [str(file.relative_to(folder)) for file in _rows_in(folder, _DATA)]
    if not files:
        return f"put one there: {', '.join(_DATA)}"
    more = ", …" if len(files) > 5 else ""
    # by its name alone: of an upload, where it lies is nobody's business
    return f"name one: {shown.name}#{files[0]}; there are {', '.join(files[:5])}{more}"


def _rows_in(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files with rows in a folder: of those closest to its top, since media may be JSON's neighbours."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.name not in _NO_ROWS and path.is_file()
    ]
    depth = min((len(path.parts) for path in found), default=0)
    return sorted(path for path in found if len(path.parts) == depth)


def _open_file(path: Path, limits: Limits, cache: Path, shown: Path, *, trusted: bool = True) -> Source:
    try:
        _check_file(path)
        kind = path.suffix.lower()
        kind = kind if kind in _DATA else _kind(path)
        if kind == ".arrow" and not trusted:
            # Arrow's own reader takes what such a file says of itself at its word
            raise DataError("Arrow files are taken from this machine only", remedy="send parquet")
        path = path.absolute()  # the working directory may be another when rows are read
        if kind in BUILDERS:
            return file_table(path, kind, cache / "tables")
        return JsonArray(path, limits) if kind == ".json" and _starts_array(path) else Lines(path, limits)
    except DataError as error:
        raise DataError(error.message, error.faults, where=str(shown), remedy=error.remedy) from error


def _kind(path: Path) -> str:
    """The suffix that a file without one of ours should have."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), ".json")


def _starts_array(path: Path) -> bool:
    """Whether JSON is one array, and not a row a line."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 16):
            if chunk.strip():
                return chunk.lstrip().startswith(b"[")
    return False
