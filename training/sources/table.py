"""Tables through Hugging Face's `datasets`: parquet, CSV and Arrow files, dataset folders, and the hub.

`datasets` keeps a table as Arrow on disk and maps it into memory, so rows are read by number in little of it.
Media are taken as they are stored, encoded, and not decoded here.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from okavango.platform.errors import DataError
from okavango.training.sources.source import Location, Raw

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_ROWS_AT_A_TIME = 64


class Table:
    """See Source.

    Args:
        table: a datasets.Dataset.
        trusted: folders whose files `datasets` itself may have named as media; those that rows name
            themselves are read as any row's are.
        file: what the table was read from; None for several files.
        blank: whether "" means that there is no value, as in CSV.
    """

    def __init__(
        self,
        table: Any,
        folder: Path,
        *,
        trusted: tuple[Path, ...] = (),
        file: Path | None = None,
        blank: bool = False,
    ) -> None:
        self.folder = folder
        self.size = file.stat().st_size if file else int(table.data.nbytes)
        self.columns: tuple[str, ...] = tuple(table.column_names)
        self._arrow = table.with_format("arrow")
        self._media = tuple(name for name, feature in table.features.items() if _is_media(feature))
        self._trusted = tuple(each.resolve() for each in trusted)
        self._file = file
        self._blank = blank

    def __len__(self) -> int:
        return len(self._arrow)

    def row(self, i: int) -> Raw:
        return self._raw(self._arrow[i : i + 1].to_pylist()[0])

    def rows(self) -> Iterator[tuple[Raw, int]]:
        count = len(self)
        for start in range(0, count, _ROWS_AT_A_TIME):
            batch = self._arrow[start : start + _ROWS_AT_A_TIME].to_pylist()
            for i, row in enumerate(batch, start + 1):
                yield self._raw(row), self.size * i // count

    def location(self, i: int) -> Location:
        return Location(i + 1, None)

    def fault(self) -> str | None:
        return None

    def sha256(self) -> Any:
        if self._file is None:
            return None
        with self._file.open("rb") as file:
            return hashlib.file_digest(file, "sha256")

    def _raw(self, row: dict[str, Any]) -> Raw:
        if self._blank:
            row = {key: None if value == "" else value for key, value in row.items()}
        for name in self._media:
            row[name] = self._loaded(row[name])
        return Raw(row)

    def _loaded(self, value: Any) -> Any:
        """A medium that `datasets` named by its file, with that file's bytes."""
        if isinstance(value, list):
            return [self._loaded(each) for each in value]
        if not isinstance(value, Mapping) or value.get("bytes") is not None or not value.get("path"):
            return value
        path = Path(value["path"])
        if not path.is_absolute() or not any(path.resolve().is_relative_to(each) for each in self._trusted):
            return value
        return {"bytes": path.read_bytes() if path.is_file() else None, "path": path.name}


def file_table(path: Path, suffix: str, cache: Path) -> Table:
    """A table in a parquet, CSV, TSV or Arrow file; `suffix` says which.

    Raises:
        DataError: it cannot be read.
    """
    is_csv = BUILDERS[suffix] == "csv"

    def load(datasets: Any) -> Any:
        options = _csv_options(path, suffix, datasets) if is_csv else {}
        files = {"data_files": str(path), "cache_dir": str(cache)}
        return datasets.load_dataset(BUILDERS[suffix], split="train", **files, **options)

    return Table(_load(str(path), load), path.parent, file=path, blank=is_csv)


def folder_table(folder: Path, split: str | None, cache: Path) -> Table:
    """A dataset folder: one that `datasets` saved, or whose files it knows how to read.

    Raises:
        DataError: it cannot be read, or has several splits and none is named.
    """
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    found = _load(
        str(folder),
        lambda datasets: (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(folder), cache_dir=str(cache))
        ),
    )
    return Table(_split(found, split, str(folder)), folder, trusted=(folder, cache))


def hub_table(name: str, split: str | None, cache: Path) -> Table:
    """A dataset of the Hugging Face hub: owner/name, or owner/name/configuration.

    Raises:
        DataError: it cannot be fetched, or has several splits and none is named.
    """
    owner, _, rest = name.partition("/")
    repository, _, configuration = rest.partition("/")
    found = _load(
        f"hub:{name}",
        lambda datasets: datasets.load_dataset(
            f"{owner}/{repository}", configuration or None, cache_dir=str(cache)
        ),
        remedy="where the hub cannot be reached, copy the dataset to a folder and name that",
    )
    return Table(_split(found, split, f"hub:{name}"), cache, trusted=(cache,))


def _csv_options(path: Path, suffix: str, datasets: Any) -> dict[str, Any]:
    """Every cell is text: what looks like a number may be an answer."""
    separator = "\t" if suffix == ".tsv" else ","
    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    twice = [name for name in names if names.count(name) > 1]
    if twice or not all(names):
        raise ValueError(f"the first line must name each column once; it is {', '.join(names)}")
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "sep": separator}


def _load(where: str, load: Callable[[Any], Any], remedy: str | None = None) -> Any:
    import datasets

    with _quiet(datasets):
        try:
            return load(datasets)
        # Builders are many and raise whatever their readers do; all of it is about the data.
        except Exception as error:
            cause = error.__cause__ or error
            text = " ".join(str(cause).split()) or type(cause).__name__
            raise DataError(f"cannot be read: {text[:500]}", where=where, remedy=remedy) from error


def _split(found: Any, split: str | None, where: str) -> Any:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        if split is not None:
            raise DataError(f"has no splits, so none is named {split!r}", where=where)
        return found
    names = ", ".join(found)
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        problem = "has several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"{problem}: {names}", where=where, remedy=f"name one: {where}#{next(iter(found))}")
    return found[split]


def _is_media(feature: Any) -> bool:
    kind = type(feature).__name__
    if kind in ("Image", "Audio"):
        return True
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return inner is not None and _is_media(inner)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars and notes of its own on the terminal."""
    shown = datasets.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
