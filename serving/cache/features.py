"""What encoders made of media, kept for whoever asks about the same ones again. Thread-safe."""

# Shapes: N positions of a medium, C encoder width

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FeatureKey:
    """All that features are computed from.

    Attributes:
        encoder: the encoder's digest, which is over its preprocessing, too.
        delta: digest of what an adapter changes in the encoder; "" for the base's own.
        medium: the medium's digest.
        precision: what is computed in.
    """

    encoder: str
    delta: str
    medium: str
    precision: str


class FeatureCache:
    """Features [N, C] within `capacity_bytes`, least recently used out first."""

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
            self._shrink()

    def resize(self, capacity_bytes: int) -> None:
        """Keep no more than so many bytes from now on."""
        with self._lock:
            self.capacity_bytes = max(0, capacity_bytes)
            self._shrink()

    def check_integrity(self) -> None:
        with self._lock:
            assert self.used_bytes == sum(item.nbytes for item in self._items.values())
            assert self.used_bytes <= self.capacity_bytes

    def _shrink(self) -> None:
        while self.used_bytes > self.capacity_bytes:
            _, oldest = self._items.popitem(last=False)
            self.used_bytes -= oldest.nbytes
