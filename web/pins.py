"""Adapters that keep their slots: names, as `okavango serve --pin` takes them, followed through the catalog.

One thread looks every second what each name stands for. Where that has changed, the engine loads the new
version; it has the pin from then on, and the old one has lost it. Versions that no server has tried yet, and
what cannot be loaded now, leave the pin where it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from okavango.platform.errors import ConfigError, NotReadyError, OkavangoError
from okavango.serving.types import AdapterRef
from okavango.web.models import Models, check_servable

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0
"""After which a version that could not be loaded is tried again."""


class Pinning(Protocol):
    """What keeps adapters: okavango.serving.engine.Engine."""

    def pin(self, adapters: Collection[AdapterRef]) -> None: ...


class Pins:
    """Keeps the adapters behind names in slots. See `begin` and `start`.

    Args:
        names: "emoji", "emoji@3" or "emoji@production"; fewer than the engine has slots.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Models,
        engine: Pinning,
        *,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._models = models
        self._engine = engine
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._pinned: dict[str, AdapterRef] = {}
        self._troubles: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="okavango-pins", daemon=True)

    def begin(self) -> None:
        """Load what the names stand for now.

        Raises:
            ConfigError: a name stands for nothing that can be served here.
        """
        for name in self._names:
            try:
                self._look(name)
            except NotReadyError as error:
                self._tell(name, error)
            except OkavangoError as error:
                raise ConfigError(error.message, where=f"--pin {name}", remedy=error.remedy) from error

    def start(self) -> None:
        """Follow the names from now on."""
        if self._names:
            self._thread.start()

    def stop(self) -> None:
        """End after what is being loaded, if anything."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            for name in self._names:
                if self._clock() >= self._due.get(name, 0.0):
                    self._follow(name)

    def _follow(self, name: str) -> None:
        """Look at a name. Nothing that catalog, store or bundle do may end this thread."""
        try:
            self._look(name)
        except Exception as error:
            self._due[name] = self._clock() + RETRY_SECONDS
            self._tell(name, error)

    def _look(self, name: str) -> None:
        """Pin what a name stands for, unless it is pinned, or will be tried by the verifier first."""
        if name == self._models.base_name:
            raise ConfigError("is the base, which needs no slot")
        version = self._models.find(name)
        if version.state == "registered":
            return
        check_servable(version)
        ref = AdapterRef(version.adapter, version.version, version.digest)
        if ref != self._pinned.get(name):
            self._pin(self._pinned | {name: ref})
            log.info("--pin %s is %s", name, ref)
        self._troubles.pop(name, None)

    def _pin(self, pinned: dict[str, AdapterRef]) -> None:
        wanted = {ref.digest: ref for ref in pinned.values()}
        if wanted.keys() != {ref.digest for ref in self._pinned.values()}:
            self._engine.pin(wanted.values())
        self._pinned = pinned

    def _tell(self, name: str, error: Exception) -> None:
        """Once, for as long as the trouble is the same."""
        if self._troubles.get(name) != str(error):
            self._troubles[name] = str(error)
            log.warning("--pin %s stays where it is: %s", name, error)
