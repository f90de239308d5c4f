"""Registered → ready, bound or refused: tries every new adapter version of this base before it takes traffic.

One thread, one version at a time; a version that a request waits for goes first. What can pass (the store
does not answer) leaves a version registered, to be tried again; what cannot makes it refused, for good.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from okavango.modalities.base import Base
from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import (
    ConflictError,
    DownloadError,
    IntegrityError,
    NotReadyError,
    OkavangoError,
    UnsupportedError,
)
from okavango.serving.adapters.gate import Verdict
from okavango.serving.types import AdapterSource

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0
"""After which a version that could not be tried is tried again, unless a request asks for it."""
IDLE_SECONDS = 60.0
"""After which the gate's own decoder is dropped."""


class BundleGate(Protocol):
    """What tries bundles: okavango.serving.adapters.gate.ParityGate."""

    def check(self, folder: Path) -> Verdict: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Trial:
    """A version in the queue. `due`: not before then, by the monotonic clock."""

    version: VersionRecord
    due: float = 0.0
    outcome: Future[VersionRecord] = field(default_factory=Future)


class Verifier:
    """Works through the catalog's registered versions in the background. See `start`.

    Args:
        poll_seconds: how often the catalog is asked for new ones.
    """

    def __init__(
        self,
        base: Base,
        catalog: Catalog,
        source: AdapterSource,
        gate: BundleGate,
        *,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._catalog = catalog
        self._source = source
        self._gate = gate
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._trials: dict[str, _Trial] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="okavango-verifier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the version that is being tried, if any. Who waits gets NotReadyError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for trial in self._trials.values():
            _fail(trial, NotReadyError("the server is stopping"))
        self._gate.close()

    def num_untried(self) -> int:
        """Versions of this base that the catalog has and no server has tried."""
        return sum(belongs_to(version, self._base) for version in self._catalog.versions("registered"))

    async def verified(self, version: VersionRecord, timeout: float) -> VersionRecord:
        """The version as it is once it was tried: now, before all others.

        Raises:
            NotReadyError: it could not be tried, or not within `timeout` seconds.
        """
        outcome = asyncio.wrap_future(self._demand(version).outcome)
        # Who has stopped waiting will not ask for the error, and asyncio would complain of that.
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(outcome), timeout=timeout)
        except TimeoutError:
            message = f"{version.ref} is still being verified; try again in a few seconds"
            raise NotReadyError(message) from None

    def _demand(self, version: VersionRecord) -> _Trial:
        with self._changed:
            if self._stopping:
                raise NotReadyError("the server is stopping")
            trial = self._trials.pop(version.ref, None) or _Trial(version)
            trial.due = 0.0
            self._trials = {version.ref: trial, **self._trials}
            self._changed.notify_all()
            return trial

    def _run(self) -> None:
        used, polled = self._clock(), float("-inf")
        while not self._stopping:
            if self._clock() - polled >= self._poll_seconds:
                self._poll()
                polled = self._clock()
            trial = self._next()
            if trial is not None:
                self._try(trial)
                used = self._clock()
                continue
            if self._clock() - used > IDLE_SECONDS:
                self._gate.close()
                used = self._clock()
            with self._changed:
                if not self._stopping and self._next() is None:
                    self._changed.wait(self._poll_seconds)

    def _poll(self) -> None:
        try:
            registered = self._catalog.versions("registered")
        except Exception as error:  # a catalog that is away for a while must not end this thread
            log.warning("the catalog cannot be asked for new versions: %s", error)
            return
        with self._changed:
            for version in registered:
                if belongs_to(version, self._base):
                    self._trials.setdefault(version.ref, _Trial(version))

    def _next(self) -> _Trial | None:
        with self._changed:
            now = self._clock()
            return next((trial for trial in self._trials.values() if trial.due <= now), None)

    def _try(self, trial: _Trial) -> None:
        """Find out and write down. Nothing that a bundle does may end this thread."""
        ref = trial.version.ref
        try:
            found = self._settle(trial.version)
        except Exception as error:
            if isinstance(error, OkavangoError):
                log.warning("%s could not be verified yet: %s", ref, error)
            else:
                log.exception("%s could not be verified", ref)
            self._postpone(trial, error)
            return
        log.info("%s is %s%s", ref, found.state, f": {found.error}" if found.error else "")
        with self._changed:
            self._trials.pop(ref, None)
        trial.outcome.set_result(found)

    def _settle(self, version: VersionRecord) -> VersionRecord:
        """The version with what was found, written to the catalog."""
        current = self._catalog.resolve(version.ref)
        if current.state != "registered":  # another server was faster
            return current
        state, verification, error = self._verdict(version)
        try:
            return self._catalog.set_version_state(
                version.adapter, version.version, state, verification=verification, error=error
            )
        except ConflictError:
            return self._catalog.resolve(version.ref)

    def _verdict(self, version: VersionRecord) -> tuple[str, dict[str, float | str] | None, str | None]:
        try:
            verdict = self._gate.check(self._source.fetch(version.digest))
        except DownloadError:
            raise
        except (IntegrityError, UnsupportedError) as error:
            return "refused", None, str(error)
        return verdict.state, verdict.verification, None

    def _postpone(self, trial: _Trial, error: Exception) -> None:
        with self._changed:
            self._trials.pop(trial.version.ref, None)
            retry = _Trial(trial.version, due=self._clock() + RETRY_SECONDS)
            self._trials[trial.version.ref] = retry
        reason = error.message if isinstance(error, OkavangoError) else "see the server's log"
        _fail(trial, NotReadyError(f"{trial.version.ref} could not be verified yet: {reason}"))


def belongs_to(version: VersionRecord, base: Base) -> bool:
    """Whether the base has every component that the version's bundle binds to."""
    return all(base.components.get(name) == digest for name, digest in version.components.items())


def _fail(trial: _Trial, error: OkavangoError) -> None:
    if not trial.outcome.done():
        trial.outcome.set_exception(error)
