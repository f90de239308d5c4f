"""Pinned adapters on their way into a slot, ahead of any request for them. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from okavango.serving.adapters.slots import SlotTable
from okavango.serving.step import Load


class Preloads:
    """Pinned adapters that have no slot yet. Each is loaded once; were that to fail, requests load it."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._weights: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._weights)

    def pin(self, adapters: Mapping[str, Any]) -> None:
        """Pin these adapters, by digest with their weights, and none else."""
        self._slots.pin(adapters)
        self._weights = {d: w for d, w in adapters.items() if d not in self._slots.residents}

    def begin(self) -> list[Load]:
        """Give slots to as many as can have one now."""
        loads = []
        for digest in [*self._weights]:
            if not self._slots.has_room(digest):
                break
            lease, weights = self._slots.acquire(digest), self._weights.pop(digest)
            self._slots.release(digest)
            loads += [Load(lease.slot, digest, weights)] if lease.load else []
        return loads
