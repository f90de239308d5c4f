"""What a frozen encoder makes of each medium, computed once and kept on disk, pooled for one way of pooling.

    <cache>/<encoder digest>-<pooling>-<precision>/<aa>/<key>.npy     float32 [G, S, E]

A key is a medium's digest, and the view's number where it is not the medium itself (training.views).

Files appear whole, by a rename, so a killed run leaves only what is right, and several runs may share one
cache. An encoder that learns makes new features in each step, so what it gets is decoded anew: see Prepared.
"""

# Shapes: G groups, S positions, E width, as in modalities.projector

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okavango.modalities.base import EncoderSpec
from okavango.modalities.content import Media
from okavango.modalities.encoders import Encoder, decode, encode, load_encoder
from okavango.modalities.projector import HeadSpec, pool
from okavango.platform.errors import DataError, MediaError
from okavango.training.dataset import Dataset
from okavango.training.monitor import Monitor
from okavango.training.views import VERSION, view

VIEWED = ("image",)  # modalities of which altered views are learned, too
_BATCH = 16


class FeatureCache:
    """Pooled features by key, of one encoder in one precision."""

    def __init__(
        self, root: Path, modality: str, encoder: EncoderSpec, head: HeadSpec, dtype: torch.dtype
    ) -> None:
        self.modality = modality
        self.encoder = encoder
        self.head = head
        self.dtype = dtype
        precision = str(dtype).removeprefix("torch.")
        self._folder = root / f"{encoder.digest[:32]}-{head.pooling_key}-{precision}"

    def load(self, key: str) -> Tensor:
        """[G, S, E] in float32.

        Raises:
            FileNotFoundError, ValueError: it is not there, or not whole.
        """
        found = np.load(self._path(key), allow_pickle=False)
        if found.ndim != 3 or found.shape[2] != self.head.pooled_width or found.dtype != np.float32:
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
        DataError: a medium that cannot be decoded, with file and line.
    """
    places = places_of(datasets, cache.modality, views)
    missing = {key: place for key, place in places if not cache.has(key)}
    if not missing:
        return 0
    encoder = load_encoder(cache.encoder, cache.dtype, device)
    with monitor.bar(f"encoding {cache.modality}", len(missing)) as advance:
        for chunk in _chunks(list(missing.items())):
            decoded = [read_place(place, cache.encoder.image_size) for _, place in chunk]
            for (key, _), features in zip(chunk, encode(encoder, decoded), strict=True):
                cache.save(key, pool(features, cache.head))
            advance(len(chunk))
            monitor.check()
    return len(missing)


class Prepared:
    """Media as an encoder that learns takes them, decoded when they are asked for."""

    def __init__(self, encoder: Encoder, modality: str, datasets: Sequence[Dataset], views: int = 0) -> None:
        self._encoder = encoder
        self._places = dict(places_of(datasets, modality, views))

    def load(self, key: str) -> Tensor:
        """Raises DataError where a medium cannot be decoded any more."""
        return self._encoder.prepare(read_place(self._places[key], self._encoder.spec.image_size))


@dataclass(frozen=True)
class Place:
    """A view of a medium, and a row that holds the medium."""

    dataset: Dataset
    row: int
    modality: str
    digest: str
    view: int


def places_of(datasets: Sequence[Dataset], modality: str, views: int) -> Iterator[tuple[str, Place]]:
    """Keys of all media of a modality, and where they are. Views of one picture follow each other."""
    numbers = range(views + 1) if modality in VIEWED else range(1)
    for dataset in datasets:
        for i, example in enumerate(dataset.rows()):
            for message in example.messages:
                for medium in message.media:
                    if medium.modality == modality:
                        for number in numbers:
                            key = view_key(medium.digest, number)
                            yield key, Place(dataset, i, modality, medium.digest, number)


def read_place(place: Place, side: int) -> Any:
    """The decoded medium, or a view of it.

    Raises:
        DataError: it cannot be decoded, with file and line.
    """
    dataset = place.dataset
    where = dataset.where(place.row)
    try:
        decoded = decode(_medium(place, where), dataset.limits)
    except MediaError as error:
        raise DataError(str(error), where=where) from error
    return view(decoded, place.digest, place.view, side) if place.view else decoded


def _medium(place: Place, where: str) -> Media:
    example = place.dataset.row(place.row)
    for message in example.messages:
        for medium in message.media:
            if medium.digest == place.digest:
                return medium
    raise DataError("a medium changed while it was read", where=where, remedy="start again")


def _chunks(items: list[tuple[str, Place]]) -> Iterator[list[tuple[str, Place]]]:
    return (items[i : i + _BATCH] for i in range(0, len(items), _BATCH))
