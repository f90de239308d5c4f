"""Media → decoder embeddings: encoders only on demand, features shared across adapters.

A feature's key is (encoder with preprocessing, medium, precision): an adapter that leaves the encoder alone
finds what another adapter's request, or the bare base's, has left there.
"""

# Shapes: N grid positions, C encoder width, M tokens of one medium, D decoder width

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from okavango.modalities.base import Base, load_head
from okavango.modalities.content import Limits, Media
from okavango.modalities.projector import ProjectionHead, pool
from okavango.platform.telemetry import Metrics
from okavango.serving.adapters.loading import Adapter

FeatureKey = tuple[str, str, str]


class FeatureCache:
    """Encoder outputs [N, C] within `capacity_bytes`, least recently used out first. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._items: OrderedDict[FeatureKey, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: FeatureKey) -> Tensor | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: FeatureKey, features: Tensor) -> None:
        with self._lock:
            if key in self._items or features.nbytes > self.capacity_bytes:
                return
            self._items[key] = features
            self.used_bytes += features.nbytes
            while self.used_bytes > self.capacity_bytes:
                _, oldest = self._items.popitem(last=False)
                self.used_bytes -= oldest.nbytes


class MediaRuntime:
    """Encoders, loaded when the first medium of their modality comes, and the base's default heads."""

    def __init__(self, base: Base, cache: FeatureCache, metrics: Metrics, device: str = "cpu") -> None:
        self.base = base
        self.device = device
        self._cache = cache
        self._metrics = metrics
        self._encoders: dict[str, _Encoder] = {}
        self._heads: dict[str, ProjectionHead] = {}
        self._encoding = threading.Lock()  # one at a time: it holds encoders while they are loaded and run
        self._heads_lock = threading.Lock()
        for modality in base.encoders:
            metrics.gauge("okavango_encoder_loaded", 0, modality=modality)

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._encoders)

    def embed(self, media: Sequence[Media], adapter: Adapter | None) -> tuple[tuple[Tensor, ...], int]:
        """One [M, D] a medium in float32, through the adapter's head or the base's; and the cache hits."""
        features, hits = self.features(media)
        vectors = []
        for medium, grid in zip(media, features, strict=True):
            head = self._head(medium.modality, adapter)
            with torch.inference_mode():
                vectors.append(head(pool(grid[None], head.spec))[0])
        return tuple(vectors), hits

    def features(self, media: Sequence[Media]) -> tuple[list[Tensor], int]:
        """The encoder's [N, C] of each medium, and how many of them were there already."""
        distinct = {medium.digest: medium for medium in media}
        found = {digest: self._features(medium) for digest, medium in distinct.items()}
        encoded = sum(not was_cached for _, was_cached in found.values())
        return [found[medium.digest][0] for medium in media], len(media) - encoded

    def _features(self, medium: Media) -> tuple[Tensor, bool]:
        """A medium's features, and whether they were in the cache."""
        key = (self.base.encoders[medium.modality].digest, medium.digest, "float32")
        features = self._cache.get(key)
        if features is None:
            with self._encoding:
                features = self._cache.get(key)  # a request that was waited for may have had the same medium
                if features is None:
                    self._metrics.count("okavango_feature_cache_misses_total", modality=medium.modality)
                    features = self._encode(medium)
                    self._cache.put(key, features)
                    return features, False
        self._metrics.count("okavango_feature_cache_hits_total", modality=medium.modality)
        return features, True

    def _encode(self, medium: Media) -> Tensor:
        encoder = self._encoder(medium.modality)
        self._metrics.count("okavango_encoder_runs_total", modality=medium.modality)
        return encoder.encode(medium)

    def _encoder(self, modality: str) -> _Encoder:
        if modality not in self._encoders:
            self._encoders[modality] = _Encoder(self.base, self.device)
            self._metrics.gauge("okavango_encoder_loaded", 1, modality=modality)
        return self._encoders[modality]

    def _head(self, modality: str, adapter: Adapter | None) -> ProjectionHead:
        if adapter is not None and modality in adapter.heads:
            return adapter.heads[modality]
        with self._heads_lock:
            if modality not in self._heads:
                self._heads[modality] = load_head(self.base.heads[modality])
            return self._heads[modality]


class _Encoder:
    """The image encoder with its decoding; open_clip is imported only when one is made."""

    def __init__(self, base: Base, device: str) -> None:
        from okavango.modalities.image import ImageEncoder

        self._encoder = ImageEncoder.load(base.encoders["image"], device=device)

    def encode(self, medium: Media) -> Tensor:
        from okavango.modalities.image import decode_image

        return self._encoder.encode([decode_image(medium.data, Limits())])[0]
