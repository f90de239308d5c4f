"""Bundles → adapters on the host, every tensor bound, kept in an LRU cache of bounded size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from okavango.modalities.adapted import encoder_targets
from okavango.modalities.base import Base
from okavango.modalities.embedding import EmbeddingHead, read_embedding
from okavango.modalities.head_files import read_head
from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.memory import give_back
from okavango.modalities.peft_files import read_peft
from okavango.modalities.projector import ProjectionHead
from okavango.platform.bundle import Manifest, read_manifest
from okavango.platform.errors import BindError

NO_LORA = LoraWeights({}, 0)


class Packed(Protocol):
    """An adapter's factors in whatever form: as they were read, or as a backend copies them into a slot."""

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class EncoderDelta:
    """What an adapter changes in an encoder. `digest` is over its files."""

    digest: str
    lora: LoraWeights


@dataclass(frozen=True)
class Adapter:
    """What a bundle brings, ready to be copied into a slot.

    Attributes:
        heads: in place of the base's, by modality.
        encoders: on top of the base's, by modality.
        embedding: the space of texts and media that was trained with these heads.
    """

    digest: str
    lora: Packed
    heads: Mapping[str, ProjectionHead] = field(default_factory=dict)
    encoders: Mapping[str, EncoderDelta] = field(default_factory=dict)
    embedding: EmbeddingHead | None = None

    @cached_property
    def nbytes(self) -> int:
        modules = [*self.heads.values(), *([self.embedding] if self.embedding is not None else [])]
        heads = sum(p.nbytes for module in modules for p in module.parameters())
        return self.lora.nbytes + heads + sum(delta.lora.nbytes for delta in self.encoders.values())


def load_adapter(
    folder: Path,
    base: Base,
    targets: Sequence[Target],
    pack: Callable[[LoraWeights], Packed] | None = None,
) -> Adapter:
    """Bind a bundle to a base, completely; `pack` brings the factors into a backend's form.

    Raises:
        BindError: it was made for other components, or a tensor does not fit.
        UnsupportedError: it uses something that is not served.
        IntegrityError: it is no bundle.
    """
    manifest = read_manifest(folder)
    check_components(manifest, base)
    decoder = folder / "decoder"
    lora = read_peft(decoder, targets) if decoder.is_dir() else NO_LORA
    heads = {modality: _head(folder, modality, base) for modality in manifest.head_modalities}
    deltas = {modality: _delta(folder, modality, base, manifest) for modality in manifest.encoder_modalities}
    if not lora.factors and not heads and not deltas:
        raise BindError("the bundle adapts nothing", where=str(folder))
    embedding = read_embedding(folder, base.width) if base.width is not None else None
    return Adapter(manifest.digest, pack(lora) if pack is not None else lora, heads, deltas, embedding)


def check_components(manifest: Manifest, base: Base) -> None:
    """Raises BindError unless the base has every component that the bundle binds to."""
    for component, digest in manifest.components.items():
        found = base.components.get(component)
        if found != digest:
            theirs = f"has another ({found[:12]})" if found else "has none"
            raise BindError(
                f"the adapter was made for {component} {digest[:12]}, and base {base.name!r} {theirs}",
                remedy="serve the base that it was trained on",
            )


def _delta(folder: Path, modality: str, base: Base, manifest: Manifest) -> EncoderDelta:
    where = f"encoders/{modality}"
    if modality not in base.encoders:
        raise BindError(f"base {base.name!r} has no {modality} encoder", where=where)
    lora = read_peft(folder / where, encoder_targets(base.encoders[modality]))
    return EncoderDelta(manifest.delta_digest(modality), lora)


def _head(folder: Path, modality: str, base: Base) -> ProjectionHead:
    head, where = read_head(folder, modality), f"projectors/{modality}"
    default = base.heads.get(modality)
    if default is None:
        raise BindError(f"base {base.name!r} has no {modality} encoder", where=where)
    for name in ("in_width", "out_width", "grid"):
        got, want = getattr(head.spec, name), getattr(default.spec, name)
        if got != want:
            raise BindError(f"{name} {got}, expected {want}", where=where)
    return head


class HostCache:
    """Adapters on the host, least recently used out first, pinned ones never. Thread-safe; one load a digest
    at a time.

    Loads run on threads of the cache's own, so that however many wait for one adapter, they hold one thread.

    Args:
        load: a digest's adapter. May block; its errors reach those who wait and are not remembered.
        threads: loads at the same time. Each takes memory for its own, and Python lets one at a time work:
            two were a third faster than four.
    """

    def __init__(self, capacity_bytes: int, load: Callable[[str], Adapter], threads: int = 2) -> None:
        self.capacity_bytes = capacity_bytes
        self.nbytes = 0
        self._load = load
        self._items: OrderedDict[str, Adapter] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._loading: dict[str, Future[Adapter]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="okavango-load")

    def pin(self, adapters: Collection[Adapter]) -> None:
        """Keep these, were they over the capacity together, and no longer those of the last call."""
        with self._lock:
            self._pinned = frozenset(adapter.digest for adapter in adapters)
            for adapter in adapters:
                self._insert(adapter)
            self._evict()

    def peek(self, digest: str) -> Adapter | None:
        with self._lock:
            return self._touch(digest)

    def get(self, digest: str) -> Adapter:
        """The adapter, loaded if need be."""
        return self.load(digest).result()

    def load(self, digest: str) -> Future[Adapter]:
        """The adapter, now or later. Who asks while it is being loaded shares that load."""
        with self._lock:
            adapter = self._touch(digest)
            if adapter is not None:
                ready: Future[Adapter] = Future()
                ready.set_result(adapter)
                return ready
            if digest not in self._loading:
                self._loading[digest] = self._threads.submit(self._run, digest)
            return self._loading[digest]

    def close(self) -> None:
        """Begin no more loads, and wait for those that run."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """The bytes are those of what is held, and over the capacity only for the pinned and one more."""
        with self._lock:
            assert self.nbytes == sum(adapter.nbytes for adapter in self._items.values()), "bytes are lost"
            others = len(self._items.keys() - self._pinned)
            assert self.nbytes <= self.capacity_bytes or others <= 1, "the cache is over its size"

    def _touch(self, digest: str) -> Adapter | None:
        if digest in self._items:
            self._items.move_to_end(digest)
        return self._items.get(digest)

    def _run(self, digest: str) -> Adapter:
        try:
            adapter = self._load(digest)
            self._put(adapter)
            return adapter
        finally:
            with self._lock:
                del self._loading[digest]
            give_back()  # a thread's free memory stays with it, and a load leaves three times the adapter's

    def _put(self, adapter: Adapter) -> None:
        with self._lock:
            self._insert(adapter)
            self._evict()

    def _insert(self, adapter: Adapter) -> None:
        if adapter.digest not in self._items:
            self._items[adapter.digest] = adapter
            self.nbytes += adapter.nbytes

    def _evict(self) -> None:
        """Of those that are not pinned, the one used last stays in any case."""
        if self.nbytes <= self.capacity_bytes:
            return
        for digest in [digest for digest in self._items if digest not in self._pinned][:-1]:
            self.nbytes -= self._items.pop(digest).nbytes
            if self.nbytes <= self.capacity_bytes:
                return
