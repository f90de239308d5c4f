"""Media → decoder embeddings: encoders only on demand, features shared across adapters.

Encoders run one medium at a time on a thread of their own, which gives way to the engine's steps: streams go
on while pictures come. An adapter that leaves the encoder alone finds the features that another adapter's
request, or the bare base's, has left there.
"""

# Shapes: N positions of a medium, C encoder width, M embeddings of one medium, D decoder width

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from okavango.modalities.adapted import adapted
from okavango.modalities.base import Base, load_head
from okavango.modalities.content import Limits, Media
from okavango.modalities.encoders import decode, encode
from okavango.modalities.projector import ProjectionHead, pool
from okavango.modalities.prompt import Rendered
from okavango.platform.errors import BindError
from okavango.platform.telemetry import Metrics
from okavango.serving.adapters.loading import Adapter
from okavango.serving.cache.features import FeatureCache, FeatureKey
from okavango.serving.encoders import EncoderOptions, Encoders

_NICE = 10
_PRECISION = "float32"


class MediaRuntime:
    """A base's encoders with their features, and its default heads."""

    def __init__(
        self,
        base: Base,
        cache: FeatureCache,
        metrics: Metrics,
        device: str = "cpu",
        options: EncoderOptions | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.base = base
        self.encoders = Encoders(base.encoders, cache, metrics, device, options)
        self._limits = limits or Limits()
        self._cache = cache
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "okavango-encode", initializer=_give_way)
        self._heads: dict[str, ProjectionHead] = {}
        self._heads_lock = threading.Lock()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.encoders.close()

    def embed(self, prompt: Rendered, adapter: Adapter | None) -> tuple[tuple[Tensor, ...], int]:
        """What goes into each span of a prompt, [span's length, D] in float32, through the adapter's encoder
        and head or the base's; and how many media's features were there already.

        Raises:
            MediaError: a medium cannot be decoded.
            BindError: encoder and prompt disagree on a medium's length.
            OkavangoError: the encoder cannot be loaded.
        """
        distinct = {(medium.modality, medium.digest): medium for medium in prompt.media}
        vectors, encoded = {}, 0
        for key, medium in distinct.items():
            vectors[key], was_cached = self.vectors(medium, adapter)
            encoded += not was_cached
        found = []
        for span, medium in zip(prompt.spans, prompt.media, strict=True):
            part = vectors[medium.modality, medium.digest][span.offset : span.offset + span.length]
            if len(part) != span.length:
                raise BindError(
                    f"{len(part)} embeddings for {span.length} positions", where=f"{medium.modality} encoder"
                )
            found.append(part)
        media = sum(span.offset == 0 for span in prompt.spans)
        return tuple(found), media - encoded

    def vectors(self, medium: Media, adapter: Adapter | None) -> tuple[Tensor, bool]:
        """What adapter or base make of a medium [M, D], and whether its features were there already.

        Raises: as `embed`.
        """
        features, was_cached = self._features(medium, adapter)
        head = self._head(medium.modality, adapter)
        with torch.inference_mode():
            vectors: Tensor = head(pool(features, head.spec)).flatten(0, 1)
        return vectors, was_cached

    def _features(self, medium: Media, adapter: Adapter | None) -> tuple[Tensor, bool]:
        """A medium's features [N, C], and whether they were in the cache."""
        delta = adapter.encoders.get(medium.modality) if adapter is not None else None
        encoder = self.encoders.check(medium.modality).digest
        key = FeatureKey(encoder, delta.digest if delta is not None else "", medium.digest, _PRECISION)
        features = self._cache.get(key)
        if features is not None:
            self._metrics.count("okavango_feature_cache_hits_total", modality=medium.modality)
            return features, True
        return self._thread.submit(self._encode, medium, adapter, key).result()

    def _encode(self, medium: Media, adapter: Adapter | None, key: FeatureKey) -> tuple[Tensor, bool]:
        features = self._cache.get(key)  # a request that was waited for may have had the same medium
        if features is not None:
            self._metrics.count("okavango_feature_cache_hits_total", modality=medium.modality)
            return features, True
        self._metrics.count("okavango_feature_cache_misses_total", modality=medium.modality)
        delta = adapter.encoders.get(medium.modality) if adapter is not None else None
        decoded = decode(medium, self._limits)
        with self.encoders.use(medium.modality) as encoder:
            self._metrics.count("okavango_encoder_runs_total", modality=medium.modality)
            with adapted(encoder.module, delta.lora if delta is not None else None):
                features = encode(encoder, [decoded])[0]
        self._cache.put(key, features)
        return features, False

    def _head(self, modality: str, adapter: Adapter | None) -> ProjectionHead:
        if adapter is not None and modality in adapter.heads:
            return adapter.heads[modality]
        with self._heads_lock:
            if modality not in self._heads:
                self._heads[modality] = load_head(self.base.heads[modality])
            return self._heads[modality]


def _give_way() -> None:
    """Have the system prefer other threads to this one and to those that it starts."""
    if sys.platform == "linux":  # elsewhere a thread has no priority by its number
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
