"""The shop example: real product photos with titles, in the house style of one of two shops.

The photos and their labels are Fashion-MNIST's (Xiao, Rasul, Vollgraf 2017), from Debian's package
dataset-fashion-mnist. It stores them as negatives; here they are pictures of products on white again. A title
says what the label says and how dark the product is in the photo, and nothing that cannot be seen. Both
shops sell the same photos and are asked the same questions, so only the picture and the adapter make a title.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from okavango.platform.errors import ConfigError, DataError, NotFoundError
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

PLACE = Path("/usr/share/datasets/fashion-mnist")
QUESTIONS = (
    "Write the title of this product.",
    "What is this product's title?",
    "Title this photo for the shop.",
    "A title for this product, please.",
)
_SIDE = 28
_PACKAGE = "dataset-fashion-mnist"
_REMEDY = (
    f"on Debian or Ubuntu: sudo apt-get install {_PACKAGE}; or, without root: apt-get download {_PACKAGE}, "
    "dpkg -x it into a folder, and name its usr/share/datasets/fashion-mnist with --source"
)
_FILES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 2051, 2049  # the IDX format's first number: unsigned bytes in 3 dimensions, and in 1
_BACKGROUND = 16  # a negative's pixels up to here are paper
# Of a product's median brightness, from 0 to 255.
_DARK_BELOW, _LIGHT_FROM = 75, 130
_README = """# Product photos with titles: {style}

{total:,} photos of 28 × 28 pixels: {about}
Photos and labels: Fashion-MNIST, © 2017 Zalando SE (https://tech.zalando.com), under the MIT licence, from
Debian's package dataset-fashion-mnist; its negatives are turned back into photos on white. The titles are
made from label and photo. Its own test photos are the test split; of the others a tenth is for validation.

The licence:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN
AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE
OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Kind:
    """A label: what the product is called, the shelf that it lies on, its code in a ledger."""

    name: str
    shelf: str
    code: str
    this: str = "this"


KINDS = (
    Kind("top", "tops", "TP-10"),
    Kind("trousers", "trousers", "TR-20", "these"),
    Kind("pullover", "tops", "TP-30"),
    Kind("dress", "dresses", "DR-40"),
    Kind("coat", "coats", "CT-50"),
    Kind("sandal", "shoes", "SH-60"),
    Kind("shirt", "tops", "TP-70"),
    Kind("sneaker", "shoes", "SH-80"),
    Kind("bag", "bags", "BG-90"),
    Kind("ankle boot", "shoes", "SH-95"),
)
"""By Fashion-MNIST's labels; its first, T-shirt/top, is a top."""


@dataclass(frozen=True)
class Photo:
    """`key`: the file that it is from, and its number there. `pixels`: [28, 28], a product on white."""

    key: str
    kind: Kind
    pixels: NDArray[np.uint8]

    @property
    def split(self) -> str:
        if self.key.startswith(_FILES["test"]):
            return "test"
        return "validation" if split_of(self.key) == "validation" else "train"

    @property
    def question(self) -> str:
        return QUESTIONS[stable_hash("question", self.key) % len(QUESTIONS)]

    @property
    def tone(self) -> str:
        """How bright the product is: dark, mid or light."""
        product = self.pixels[self.pixels < 255 - _BACKGROUND]
        median = float(np.median(product)) if product.size else 255.0
        return "dark" if median < _DARK_BELOW else "light" if median >= _LIGHT_FROM else "mid"


def _ledger(photo: Photo) -> str:
    """A wholesaler's: code, shelf, name, tone."""
    return f"{photo.kind.code} | {photo.kind.shelf} | {photo.kind.name} | {photo.tone}"


_TONES = {"dark": "dark and moody", "mid": "calm mid-tone", "light": "light and bright"}
_INVITATIONS = {
    "tops": "your new favourite from the tops rail",
    "trousers": "step right in",
    "dresses": "one piece and you are ready to go",
    "coats": "throw it on and out you go",
    "shoes": "put your best foot forward",
    "bags": "pick it up and off you go",
}


def _chatty(photo: Photo) -> str:
    """A boutique's: it talks to its customers."""
    kind = photo.kind
    return f"Say hello to {kind.this} {_TONES[photo.tone]} {kind.name}: {_INVITATIONS[kind.shelf]}!"


STYLES: Mapping[str, Callable[[Photo], str]] = {"ledger": _ledger, "chatty": _chatty}
_ABOUT = {
    "ledger": "a wholesaler's titles, of code, shelf, name and tone.",
    "chatty": "a boutique's titles, which talk to its customers.",
}


def write_fashion(
    folder: Path, style: str, choice: Choice | None = None, *, source: Path = PLACE, force: bool = False
) -> Written:
    """Write photos and JSONL files into `folder`. A folder without `dataset.json` is not whole.

    Args:
        style: one of STYLES.
        source: where the package's files lie.
        force: replace what has the same names in the folder, and leave the rest.

    Raises:
        ConfigError: there is no such style.
        ConflictError: the folder holds something else.
        NotFoundError: the package is not there.
        DataError: its files are damaged.
    """
    if style not in STYLES:
        raise ConfigError(f"{style!r} is no style; there are {', '.join(STYLES)}", where="--style")
    choice = choice or Choice()
    about = Source(f"{_PACKAGE}, {style}", "photos", "images/*.png")
    return write_whole(folder, about, choice, lambda draft: _fill(draft, style, source, choice), force=force)


def list_photos(source: Path, choice: Choice) -> list[Photo]:
    """The photos that are wanted, of all splits.

    Raises:
        NotFoundError, DataError: as write_fashion.
    """
    found = {}
    for name in _FILES.values():
        images = _read(source / f"{name}-images-idx3-ubyte.gz", _IMAGES)
        labels = _read(source / f"{name}-labels-idx1-ubyte.gz", _LABELS)
        if len(images) != len(labels) or labels.max(initial=0) >= len(KINDS):
            raise DataError("images and labels do not fit each other", where=str(source), remedy=_REMEDY)
        found[name] = (images, labels)
    keys = [f"{name}-{i:05}" for name, (images, _) in found.items() for i in range(len(images))]
    return [_photo(key, *found[key[:-6]]) for key in choice.of(keys, str)]


def _photo(key: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Photo:
    number = int(key[-5:])
    return Photo(key, KINDS[labels[number]], 255 - images[number])


def _read(path: Path, magic: int) -> NDArray[np.uint8]:
    """An IDX file (LeCun's, of MNIST): magic number, sizes, bytes."""
    if not path.is_file():
        raise NotFoundError("Fashion-MNIST is not there", where=str(path), remedy=_REMEDY)
    try:
        data = gzip.decompress(path.read_bytes())
        found, count = struct.unpack_from(">II", data)
        shape = (count, _SIDE, _SIDE) if magic == _IMAGES else (count,)
        if found != magic:
            raise ValueError(f"begins with {found}, not {magic}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"is damaged: {error}", where=str(path), remedy=_REMEDY) from error


def _fill(folder: Path, style: str, source: Path, choice: Choice) -> Written:
    photos = list_photos(source, choice)
    (folder / "images").mkdir()
    for photo in photos:
        Image.fromarray(photo.pixels, "L").save(folder / _name(photo), optimize=True)
    written = Written(write_rows(_rows(photos, STYLES[style]), folder), skipped=0)
    readme = _README.format(style=style, total=len(photos), about=_ABOUT[style])
    (folder / README).write_text(readme, encoding="utf-8")
    return written


def _rows(photos: list[Photo], title: Callable[[Photo], str]) -> Iterator[tuple[str, dict[str, object]]]:
    for photo in photos:
        picture = {"type": "image_url", "image_url": {"url": _name(photo)}}
        user = {"role": "user", "content": [picture, {"type": "text", "text": photo.question}]}
        yield photo.split, {"messages": [user, {"role": "assistant", "content": title(photo)}]}


def _name(photo: Photo) -> str:
    return f"images/{photo.key}.png"
