"""What example datasets share: the same rows and splits on every machine, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from okavango.modalities.draft import draft_folder
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import ConflictError

SPLITS = ("train", "validation", "test")
README = "README.md"
RECORD = "dataset.json"  # written last: with it, the dataset is whole
_UNFINISHED = ".unfinished"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """Which rows are wanted: all, or `limit` of them. A smaller choice of a seed is part of a larger one."""

    limit: int | None = None
    seed: int = 0

    def of(self, items: Iterable[Item], key: Callable[[Item], str]) -> list[Item]:
        return sorted(items, key=lambda item: stable_hash(f"sample {self.seed}", key(item)))[: self.limit]


@dataclass(frozen=True)
class Written:
    """Rows by split, what was left out; `existed` if nothing had to be done."""

    rows: dict[str, int]
    skipped: int
    existed: bool = False


@dataclass(frozen=True)
class Source:
    """Attributes:
    name: what the data come from, as its record says.
    things: what they are of, in words.
    media: the pattern of their files.
    """

    name: str
    things: str
    media: str


def stable_hash(purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{key}".encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """80 % train, 10 % validation, 10 % test, by this key alone."""
    share = stable_hash("split", key) % 10
    return "test" if share == 0 else "validation" if share == 1 else "train"


def write_rows(rows: Iterable[tuple[str, dict[str, object]]], folder: Path) -> dict[str, int]:
    """A JSONL file for each split, of (split, row); gives the rows of each."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, row in rows:
        lines[split].append(json.dumps(row) + "\n")
    for split, chosen in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(chosen))
    return {split: len(chosen) for split, chosen in lines.items()}


def write_whole(
    folder: Path, source: Source, choice: Choice, fill: Callable[[Path], Written], *, force: bool = False
) -> Written:
    """Put what `fill` writes into `folder`. A folder without `dataset.json` is not whole.

    Args:
        force: replace what has the same names in the folder, and leave the rest.

    Raises:
        ConflictError: the folder holds something else.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ConflictError("is not a folder", where=str(folder), remedy="name another")
    found = None if force else _found(folder, source, choice)
    if found:
        return found
    with draft_folder(folder.parent, folder.name) as draft:
        written = fill(draft)
        record = _record(draft, source, choice, written)
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _put_in_place(draft, folder)
    return written


def _record(folder: Path, source: Source, choice: Choice, written: Written) -> dict[str, object]:
    return {
        "source": source.name,
        "choice": asdict(choice),
        "rows": written.rows,
        "skipped": written.skipped,
        "sha256": {f"{split}.jsonl": file_sha256(folder / f"{split}.jsonl") for split in SPLITS},
    }


def _found(folder: Path, source: Source, choice: Choice) -> Written | None:
    """The dataset, if this folder holds it; None if it may be written here. Raises ConflictError."""
    if not folder.exists() or (folder / _UNFINISHED).exists() or not any(folder.iterdir()):
        return None
    problem = "the folder holds something else"
    with suppress(AttributeError, OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / RECORD).read_text())
        found = Written(record["rows"], record["skipped"], existed=True)
        whole = sum(found.rows.values()) <= sum(1 for _ in folder.glob(source.media))
        if whole and record == _record(folder, source, choice, found):
            return found
        if record["source"] == source.name:
            same = record["choice"] == asdict(choice)
            problem = (
                f"the folder holds {'a changed dataset' if same else f'another choice of {source.things}'}"
            )
    remedy = "name another folder, or write over it with --force, which leaves other files"
    raise ConflictError(problem, where=str(folder), remedy=remedy)


def _put_in_place(draft: Path, folder: Path) -> None:
    """By one rename; or into a folder that exists, which may be the working directory or a mount: file by
    file, marked as unfinished meanwhile, the record last."""
    if not folder.exists():
        draft.rename(folder)
        return
    (folder / _UNFINISHED).touch()
    (folder / RECORD).unlink(missing_ok=True)
    names = [str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()]
    for name in sorted(names, key=RECORD.__eq__):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(draft / name, folder / name)
    (folder / _UNFINISHED).unlink()
