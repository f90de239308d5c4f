"""What a frozen encoder makes of each picture, computed once and kept on disk, pooled for one head's shape.

    <cache>/<encoder digest>-<grid>-<tokens>-<precision>/<aa>/<media digest>.npy     float32 [E, C]

Files appear whole, by a rename, so a killed run leaves only what is right, and several runs may share one
cache.
"""

# Shapes: E tokens a medium, C encoder width

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
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

if TYPE_CHECKING:
    from PIL import Image

_BATCH = 16


class FeatureCache:
    """Pooled features by media digest, of one encoder in one precision."""

    def __init__(self, root: Path, encoder: EncoderSpec, head: HeadSpec, dtype: torch.dtype) -> None:
        self.encoder = encoder
        self.head = head
        self.dtype = dtype
        grid = "x".join(map(str, head.grid))
        precision = str(dtype).removeprefix("torch.")
        self._folder = root / f"{encoder.digest[:32]}-{grid}-{head.tokens}-{precision}"
        self._shape = (head.tokens, head.in_width)

    def load(self, digest: str) -> Tensor:
        """[E, C] in float32.

        Raises:
            FileNotFoundError, ValueError: it is not there, or not whole.
        """
        found = np.load(self._path(digest), allow_pickle=False)
        if found.shape != self._shape or found.dtype != np.float32:
            raise ValueError(f"{self._path(digest)} holds {found.dtype} {found.shape}")
        return torch.from_numpy(found)

    def save(self, digest: str, features: Tensor) -> None:
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}.npy")
        try:
            np.save(partial, features.numpy())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def has(self, digest: str) -> bool:
        """Whether the features can be read; a damaged file counts as none."""
        try:
            self.load(digest)
        except (OSError, ValueError, EOFError):
            return False
        return True

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.npy"


def fill_cache(cache: FeatureCache, datasets: Sequence[Dataset], device: str, monitor: Monitor) -> int:
    """Compute what is missing of the datasets' media, and return how many that were.

    Raises:
        DataError: a picture that cannot be decoded, with file and line.
    """
    missing = dict(_missing(cache, datasets))
    if not missing:
        return 0
    encoder = ImageEncoder.load(cache.encoder, cache.dtype, device)
    with monitor.bar("encoding pictures", len(missing)) as advance:
        for chunk in _chunks(list(missing.items())):
            pictures = [_read(place, digest) for digest, place in chunk]
            pooled = pool(encoder.encode(pictures), cache.head)
            for (digest, _), features in zip(chunk, pooled, strict=True):
                cache.save(digest, features)
            advance(len(chunk))
            monitor.check()
    return len(missing)


Place = tuple[Dataset, int]


def _missing(cache: FeatureCache, datasets: Sequence[Dataset]) -> Iterator[tuple[str, Place]]:
    """Digests of media that the cache does not have, each with a row that holds it."""
    for dataset in datasets:
        for i, example in enumerate(dataset.rows()):
            for message in example.messages:
                for medium in message.media:
                    if not cache.has(medium.digest):
                        yield medium.digest, (dataset, i)


def _chunks(items: list[tuple[str, Place]]) -> Iterator[list[tuple[str, Place]]]:
    return (items[i : i + _BATCH] for i in range(0, len(items), _BATCH))


def _read(place: Place, digest: str) -> Image.Image:
    dataset, i = place
    example = dataset.row(i)
    media = (medium for message in example.messages for medium in message.media)
    data = next((medium.data for medium in media if medium.digest == digest), None)
    where = f"{dataset.path}:{example.line}"
    if data is None:
        raise DataError("a picture changed while it was read", where=where, remedy="start again")
    try:
        return decode_image(data, dataset.limits)
    except MediaError as error:
        raise DataError(str(error), where=where) from error
