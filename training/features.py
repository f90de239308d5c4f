"""What a frozen encoder makes of each picture, computed once and kept on disk, pooled for one head's shape.

    <cache>/<encoder digest>-<grid>-<tokens>-<precision>/<aa>/<key>.npy     float32 [E, C]

A key is a medium's digest, and the view's number where it is not the picture itself (training.views).

Files appear whole, by a rename, so a killed run leaves only what is right, and several runs may share one
cache.
"""

# Shapes: E tokens a medium, C encoder width

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from okavango.modalities.base import EncoderSpec
from okavango.modalities.image import ImageEncoder, decode_image
from okavango.modalities.projector import HeadSpec, pool
from okavango.platform.errors import DataError, MediaError
from okavango.training.dataset import Dataset
from okavango.training.monitor import Monitor
from okavango.training.views import VERSION, view

if TYPE_CHECKING:
    from PIL import Image

_BATCH = 16


class FeatureCache:
    """Pooled features by key, of one encoder in one precision."""

    def __init__(self, root: Path, encoder: EncoderSpec, head: HeadSpec, dtype: torch.dtype) -> None:
        self.encoder = encoder
        self.head = head
        self.dtype = dtype
        grid = "x".join(map(str, head.grid))
        precision = str(dtype).removeprefix("torch.")
        self._folder = root / f"{encoder.digest[:32]}-{grid}-{head.tokens}-{precision}"
        self._shape = (head.tokens, head.in_width)

    def load(self, key: str) -> Tensor:
        """[E, C] in float32.

        Raises:
            FileNotFoundError, ValueError: it is not there, or not whole.
        """
        found = np.load(self._path(key), allow_pickle=False)
        if found.shape != self._shape or found.dtype != np.float32:
            raise ValueError(f"{self._path(key)} holds {found.dtype} {found.shape}")
        return torch.from_numpy(found)

    def save(self, key: str, features: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}.npy")
        try:
            np.save(partial, features.numpy())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def has(self, key: str) -> bool:
        """Whether the features can be read; a damaged file counts as none."""
        try:
            self.load(key)
        except (OSError, ValueError, EOFError):
            return False
        return True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npy"


def view_key(digest: str, number: int) -> str:
    """The key of a medium's view; view 0 is the medium itself."""
    return f"{digest}~{VERSION}.{number}" if number else digest


def fill_cache(
    cache: FeatureCache, datasets: Sequence[Dataset], device: str, monitor: Monitor, views: int = 0
) -> int:
    """Compute what is missing of the datasets' media and so many altered views of each; how many that were.

    Raises:
        DataError: a picture that cannot be decoded, with file and line.
    """
    missing = dict(_missing(cache, datasets, views))
    if not missing:
        return 0
    encoder = ImageEncoder.load(cache.encoder, cache.dtype, device)
    with monitor.bar("encoding pictures", len(missing)) as advance:
        for chunk in _chunks(list(missing.items())):
            pictures = [
                view(_read(place), place.digest, place.view, cache.encoder.image_size) for _, place in chunk
            ]
            pooled = pool(encoder.encode(pictures), cache.head)
            for (key, _), features in zip(chunk, pooled, strict=True):
                cache.save(key, features)
            advance(len(chunk))
            monitor.check()
    return len(missing)


@dataclass(frozen=True)
class Place:
    """A view of a medium, and a row that holds the medium."""

    dataset: Dataset
    row: int
    digest: str
    view: int


def _missing(cache: FeatureCache, datasets: Sequence[Dataset], views: int) -> Iterator[tuple[str, Place]]:
    """Keys of what the cache does not have. Views of one picture follow each other."""
    for dataset in datasets:
        for i, example in enumerate(dataset.rows()):
            for message in example.messages:
                for medium in message.media:
                    for number in range(views + 1):
                        key = view_key(medium.digest, number)
                        if not cache.has(key):
                            yield key, Place(dataset, i, medium.digest, number)


def _chunks(items: list[tuple[str, Place]]) -> Iterator[list[tuple[str, Place]]]:
    return (items[i : i + _BATCH] for i in range(0, len(items), _BATCH))


def _read(place: Place) -> Image.Image:
    dataset, example = place.dataset, place.dataset.row(place.row)
    media = (medium for message in example.messages for medium in message.media)
    data = next((medium.data for medium in media if medium.digest == place.digest), None)
    where = f"{dataset.path}:{example.line}"
    if data is None:
        raise DataError("a picture changed while it was read", where=where, remedy="start again")
    try:
        return decode_image(data, dataset.limits)
    except MediaError as error:
        raise DataError(str(error), where=where) from error
