"""A job's lease while it is worked on. Needs neither torch nor the data, so that a process can say that it
lives before it has loaded them."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import suppress

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import NotReadyError, OkavangoError
from okavango.training.monitor import Monitor, Reason

LEASE_SECONDS = 30.0
_BEATS_A_LEASE = 4
_EVENT_SECONDS = 1.0
"""So long may an event wait until others can read it."""


class Lease:
    """Says while its block lasts that the worker lives, writes progress and events, hears whether to stop.

    Args:
        job_id: a job that `worker` holds.
    """

    def __init__(self, catalog: Catalog, job_id: str, worker: str, seconds: float, monitor: Monitor) -> None:
        self.worker = worker
        self._catalog, self._job = catalog, job_id
        self._seconds = seconds
        self._monitor = monitor
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {job_id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Write the last events. No more is said after this, and the job is still held."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        if self._monitor.reason is not Reason.LOST and self._monitor.has_events:
            with suppress(OkavangoError):  # whoever ends the job next is told the same
                self._beat()

    def _keep(self) -> None:
        beat, heard = self._seconds / _BEATS_A_LEASE, time.monotonic()
        while not self._over.wait(min(beat, _EVENT_SECONDS)):
            now = time.monotonic()
            if now - heard < beat and not self._monitor.has_events:
                continue
            try:
                self._beat()
                heard = now
            except NotReadyError:
                if time.monotonic() - heard > self._seconds:
                    self._monitor.stop(Reason.LOST)
            except OkavangoError:
                self._monitor.stop(Reason.LOST)
                return

    def _beat(self) -> None:
        monitor = self._monitor
        with monitor.taken_events() as events:
            job = self._catalog.heartbeat(
                self._job, self.worker, self._seconds, monitor.progress or None, events
            )
        if job.cancel_requested:
            monitor.stop(Reason.CANCEL)
        elif job.pause_requested:
            monitor.stop(Reason.PAUSE)


def new_worker() -> str:
    """A name that no other worker has: host, process, and a random part."""
    return f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
