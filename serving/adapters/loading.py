"""Bundles → adapters on the host, every tensor bound, kept in an LRU cache of bounded size."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file

from okavango.modalities.base import Base
from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.peft_files import read_peft
from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head
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
class Adapter:
    """What a bundle brings, ready to be copied into a slot. `heads` replace the base's, by modality."""

    digest: str
    lora: Packed
    heads: Mapping[str, ProjectionHead] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        heads = sum(p.nbytes for head in self.heads.values() for p in head.parameters())
        return self.lora.nbytes + heads


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
    if not lora.factors and not heads:
        raise BindError("the bundle adapts nothing", where=str(folder))
    return Adapter(manifest.digest, pack(lora) if pack is not None else lora, heads)


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


def _head(folder: Path, modality: str, base: Base) -> ProjectionHead:
    path = folder / "projectors" / f"{modality}.safetensors"
    try:
        spec = HeadSpec(**json.loads(path.with_suffix(".json").read_text()))
        tensors = load_file(path)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BindError(f"not a projection head: {error}", where=f"projectors/{modality}") from error
    default = base.heads.get(modality)
    if default is None:
        raise BindError(f"base {base.name!r} has no {modality} encoder", where=f"projectors/{modality}")
    for name in ("in_width", "out_width", "grid", "tokens"):
        got, want = getattr(spec, name), getattr(default.spec, name)
        if got != want:
            raise BindError(f"{name} {got}, expected {want}", where=f"projectors/{modality}")
    return bind_head(spec, tensors, where=f"projectors/{modality}")


class HostCache:
    """Adapters on the host, least recently used out first. Thread-safe; one load a digest at a time.

    Loads run on threads of the cache's own, so that however many wait for one adapter, they hold one thread.

    Args:
        load: a digest's adapter. May block; its errors reach those who wait and are not remembered.
        threads: loads at the same time.
    """

    def __init__(self, capacity_bytes: int, load: Callable[[str], Adapter], threads: int = 4) -> None:
        self.capacity_bytes = capacity_bytes
        self.nbytes = 0
        self._load = load
        self._items: OrderedDict[str, Adapter] = OrderedDict()
        self._loading: dict[str, Future[Adapter]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="okavango-load")

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
        """The bytes are those of what is held, and over the capacity only for a single adapter."""
        with self._lock:
            assert self.nbytes == sum(adapter.nbytes for adapter in self._items.values()), "bytes are lost"
            assert self.nbytes <= self.capacity_bytes or len(self._items) == 1, "the cache is over its size"

    def _touch(self, digest: str) -> Adapter | None:
        if digest in self._items:
            self._items.move_to_end(digest)
        return self._items.get(digest)

    def _run(self, digest: str) -> Adapter:
        try:
            adapter = self._load(digest)
            self._put(digest, adapter)
            return adapter
        finally:
            with self._lock:
                del self._loading[digest]

    def _put(self, digest: str, adapter: Adapter) -> None:
        with self._lock:
            self._items[digest] = adapter
            self.nbytes += adapter.nbytes
            while len(self._items) > 1 and self.nbytes > self.capacity_bytes:
                _, evicted = self._items.popitem(last=False)
                self.nbytes -= evicted.nbytes
