"""Encoders in memory: loaded when a medium first needs them, gone when nobody has for a while.

They share one budget of bytes with the features that they make. An encoder that needs room takes it from
features first, then from encoders that nobody is using; where those that are used leave none, it waits.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.base import EncoderSpec
from okavango.modalities.encoders import Encoder, load_encoder
from okavango.modalities.memory import give_back
from okavango.platform.errors import ConfigError, NotReadyError, OkavangoError, UnsupportedError
from okavango.platform.telemetry import Metrics
from okavango.serving.cache.features import FeatureCache

log = logging.getLogger(__name__)

_MORE_MEMORY = "raise --memory, or lower --kv-memory"


@dataclass(frozen=True)
class EncoderOptions:
    """How encoders are held.

    Attributes:
        preload: modalities whose encoder is loaded at the start, and stays, whoever needs the memory.
        disabled: modalities that are not served.
        idle_seconds: after so long without a medium an encoder is unloaded; None keeps it.
        capacity_bytes: for encoders and features together; None sets no limit.
    """

    preload: Collection[str] = ()
    disabled: Collection[str] = ()
    idle_seconds: float | None = None
    capacity_bytes: int | None = None


@dataclass
class _Held:
    """`users`: runs under way. `idle_since`: when the last of them ended."""

    encoder: Encoder
    nbytes: int
    users: int = 0
    idle_since: float = 0.0


@dataclass
class _Loading:
    """`nbytes`: what is promised to it. `error`: why it failed, for those who wait for it."""

    nbytes: int
    error: OkavangoError | None = None


class Encoders:
    """The encoders of one base, by modality. Thread-safe.

    Raises:
        ConfigError: an option names a modality that the base has no encoder for, or what is to be loaded at
            the start does not fit.
    """

    def __init__(
        self,
        specs: Mapping[str, EncoderSpec],
        features: FeatureCache,
        metrics: Metrics,
        device: str = "cpu",
        options: EncoderOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options = options or EncoderOptions()
        self._specs = specs
        self._features = features
        self._most_features = features.capacity_bytes
        self._metrics = metrics
        self._device = device
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._loading: dict[str, _Loading] = {}
        self._sizes: dict[str, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._sweeper: threading.Thread | None = None
        self._check_options()
        for modality in specs:
            metrics.gauge("okavango_encoder_loaded", 0, modality=modality)
        self._resize_features()

    @property
    def loaded(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(self._held)

    def preload(self) -> None:
        """Load what is to be there from the start."""
        for modality in self.options.preload:
            with self.use(modality):
                pass

    def check(self, modality: str) -> EncoderSpec:
        """The encoder's spec.

        Raises:
            UnsupportedError: the base has none, or it is switched off.
        """
        if modality in self.options.disabled:
            raise UnsupportedError(f"{modality} is switched off on this server", remedy="ask without it")
        if modality not in self._specs:
            raise UnsupportedError(f"this base has no {modality} encoder")
        return self._specs[modality]

    @contextmanager
    def use(self, modality: str) -> Iterator[Encoder]:
        """The encoder, loaded if it is not, and kept while the block runs.

        Who asks while it is being loaded shares that load, and its failure; the next one tries again.

        Raises:
            UnsupportedError: as `check`; or there will never be memory for it.
            NotReadyError: the server is stopping.
            OkavangoError: it cannot be loaded.
        """
        held = self._take(modality)
        try:
            yield held.encoder
        finally:
            with self._changed:
                held.users -= 1
                held.idle_since = self._clock()
                self._changed.notify_all()

    def unload_idle(self) -> float | None:
        """Unload what nobody has used for too long; seconds until there is more to do, None where that hangs
        on uses to come."""
        limit = self.options.idle_seconds
        if limit is None:
            return None
        with self._changed:
            left = {name: self._held[name].idle_since + limit - self._clock() for name in self._idle()}
            for modality, seconds in left.items():
                if seconds <= 0:
                    self._unload(modality, "idle")
            return min((seconds for seconds in left.values() if seconds > 0), default=None)

    def close(self) -> None:
        """Unload everything, once those who are using it are done; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_unused)
            for modality in list(self._held):
                self._unload(modality, "closed")
        if self._sweeper is not None:
            self._sweeper.join()

    def check_integrity(self) -> None:
        with self._changed:
            capacity = self.options.capacity_bytes
            assert all(held.users >= 0 for held in self._held.values()), "an encoder was given back twice"
            assert not self._held.keys() & self._loading.keys(), "what is there is loaded again"
            if capacity is not None:
                assert self._taken + self._features.capacity_bytes <= capacity, "over the budget"
            self._features.check_integrity()

    def _check_options(self) -> None:
        options = self.options
        for name in (*options.preload, *options.disabled):
            if name not in self._specs:
                known = ", ".join(self._specs) or "none"
                raise ConfigError(f"the base has no {name} encoder; it has {known}", where="encoders")
        need, capacity = sum(self._size(name) for name in options.preload), options.capacity_bytes
        if capacity is not None and need > capacity:
            raise ConfigError(
                f"encoders to load at the start take {need:,} bytes, and media have {capacity:,}",
                where="preload",
                remedy=_MORE_MEMORY,
            )

    def _take(self, modality: str) -> _Held:
        self.check(modality)
        self._check_room(modality)
        with self._changed:
            held = self._held_or_turn(modality)
        return held if held is not None else self._load(modality)

    def _check_room(self, modality: str) -> None:
        """Raises UnsupportedError where an encoder would wait for memory for ever."""
        if self.options.capacity_bytes is None:
            return
        kept = sum(self._size(name) for name in self.options.preload if name != modality)
        need, most = self._size(modality), self.options.capacity_bytes - kept
        if need > most:
            beside = " beside what was loaded at the start" if kept else ""
            raise UnsupportedError(
                f"the {modality} encoder takes {need:,} bytes, and media have {most:,}{beside}",
                remedy=_MORE_MEMORY,
            )

    def _held_or_turn(self, modality: str) -> _Held | None:
        """The encoder, as soon as it is there; None where it is the caller's turn to load it."""
        while True:
            if self._closed:
                raise NotReadyError("the server is stopping")
            held = self._held.get(modality)
            if held is not None:
                held.users += 1
                return held
            others = self._loading.get(modality)
            if others is None and self._make_room(need := self._size(modality)):
                self._loading[modality] = _Loading(need)
                self._resize_features()
                return None
            self._changed.wait()
            if others is not None and others.error is not None:
                raise others.error

    def _load(self, modality: str) -> _Held:
        """Outside the lock, so that other encoders can be used; this thread alone loads this one."""
        loading, held = self._loading[modality], None
        try:
            began = self._clock()
            encoder = load_encoder(self._specs[modality], device=self._device)
            held = _Held(encoder, loading.nbytes, users=1)
            log.info("%s encoder loaded in %.1f s", modality, self._clock() - began)
            return held
        except Exception as error:
            loading.error = _told(modality, error)
            raise loading.error from error
        finally:
            with self._changed:
                del self._loading[modality]
                if held is not None:
                    self._hold(modality, held)
                self._resize_features()
                self._changed.notify_all()

    def _hold(self, modality: str, held: _Held) -> None:
        self._held[modality] = held
        self._metrics.gauge("okavango_encoder_loaded", 1, modality=modality)
        self._metrics.count("okavango_encoder_loads_total", modality=modality)
        if self.options.idle_seconds is not None and self._sweeper is None and not self._closed:
            self._sweeper = threading.Thread(target=self._sweep, name="okavango-encoders", daemon=True)
            self._sweeper.start()

    def _size(self, modality: str) -> int:
        if modality not in self._sizes:
            self._sizes[modality] = weights_bytes(self._specs[modality].path)
        return self._sizes[modality]

    def _idle(self) -> list[str]:
        """Encoders that may go, longest unused first."""
        names = [name for name, held in self._held.items() if not held.users]
        names = [name for name in names if name not in self.options.preload]
        return sorted(names, key=lambda name: self._held[name].idle_since)

    def _is_unused(self) -> bool:
        return not self._loading and not any(held.users for held in self._held.values())

    @property
    def _taken(self) -> int:
        held = sum(held.nbytes for held in self._held.values())
        return held + sum(loading.nbytes for loading in self._loading.values())

    def _make_room(self, need: int) -> bool:
        """Whether there is memory for `need` bytes more, once encoders that nobody is using are gone."""
        capacity, idle = self.options.capacity_bytes, self._idle()
        while capacity is not None and self._taken + need > capacity:
            if not idle:
                return False
            self._unload(idle.pop(0), "memory")
        return True

    def _resize_features(self) -> None:
        """Features have what encoders leave them."""
        capacity = self.options.capacity_bytes
        if capacity is not None:
            self._features.resize(min(self._most_features, capacity - self._taken))

    def _unload(self, modality: str, reason: str) -> None:
        del self._held[modality]
        self._metrics.gauge("okavango_encoder_loaded", 0, modality=modality)
        self._metrics.count("okavango_encoder_unloads_total", modality=modality, reason=reason)
        log.info("%s encoder unloaded (%s)", modality, reason)
        give_back()
        self._resize_features()

    def _sweep(self) -> None:
        with self._changed:  # from look to wait, or a use that ends between them would go unseen
            while not self._closed:
                self._changed.wait(self.unload_idle())


def weights_bytes(folder: Path) -> int:
    """What the weights in a folder take in float32.

    Raises:
        ConfigError: they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"not readable: {error}", where=str(path)) from error
        total += sum(4 * math.prod(shape) for shape in shapes)
    return total


def _told(modality: str, error: Exception) -> OkavangoError:
    """What went wrong, as an error that says where."""
    if isinstance(error, OkavangoError):
        return error
    log.error("the %s encoder cannot be loaded", modality, exc_info=error)
    return OkavangoError(f"the {modality} encoder cannot be loaded: {error!r}")
