"""Bundles → adapters on the host, every tensor bound, kept in an LRU cache of bounded size."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

from safetensors import SafetensorError
from safetensors.torch import load_file

from okavango.modalities.base import Base
from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.peft_files import read_peft
from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head
from okavango.platform.bundle import Manifest, read_manifest
from okavango.platform.errors import BindError

NO_LORA = LoraWeights({}, 0)


@dataclass(frozen=True)
class Adapter:
    """What a bundle brings, ready to be copied into a slot. `heads` replace the base's, by modality."""

    digest: str
    lora: LoraWeights
    heads: Mapping[str, ProjectionHead] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        tensors = [t for pair in self.lora.factors.values() for t in pair]
        tensors += [p for head in self.heads.values() for p in head.parameters()]
        return sum(t.nbytes for t in tensors)


def load_adapter(folder: Path, base: Base, targets: Sequence[Target]) -> Adapter:
    """Bind a bundle to a base, completely.

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
    return Adapter(manifest.digest, lora, heads)


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

    Args:
        load: a digest's adapter. May block; its errors pass through `get` and are not remembered.
    """

    def __init__(self, capacity_bytes: int, load: Callable[[str], Adapter]) -> None:
        self.capacity_bytes = capacity_bytes
        self._load = load
        self._items: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()
        # a digest's lock lives for as long as a thread loads it or waits for it
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def peek(self, digest: str) -> Adapter | None:
        with self._lock:
            if digest in self._items:
                self._items.move_to_end(digest)
            return self._items.get(digest)

    def get(self, digest: str) -> Adapter:
        """The adapter, loaded if need be."""
        with self._lock:
            turn = self._turns.setdefault(digest, threading.Lock())
        with turn:
            adapter = self.peek(digest)
            if adapter is None:
                adapter = self._load(digest)
                self._put(digest, adapter)
        return adapter

    def _put(self, digest: str, adapter: Adapter) -> None:
        with self._lock:
            self._items[digest] = adapter
            while len(self._items) > 1 and sum(a.nbytes for a in self._items.values()) > self.capacity_bytes:
                self._items.popitem(last=False)
