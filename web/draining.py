"""Admission, and the way out: how many calls are in progress, and how the server ends without cutting them.

The first SIGTERM or SIGINT closes the gate: new calls get a 503 with Retry-After, /readyz turns 503, those
in progress finish. When they have, or the limit is up, what is left is told so, and the server exits. A
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from okavango.platform.errors import BusyError, NotReadyError

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
LAST_WORDS_SECONDS = 2.0
"""For calls that were cut to send their error."""


class Gate:
    """Counts calls in progress. Used on the event loop only, save for `close`.

    Args:
        limit: calls in progress at once; one more is refused before its body is read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.draining = False

    def close(self) -> None:
        self.draining = True

    def check(self) -> None:
        """Raises NotReadyError once the gate is closed."""
        if self.draining:
            raise NotReadyError("the server is shutting down")

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """One call. Raises NotReadyError once the gate is closed, BusyError over the limit."""
        self.check()
        if self.active >= self.limit:
            raise BusyError(f"{self.active} calls are in progress already", retry_after=RETRY_SECONDS)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn, leaving by the gate.

    Args:
        is_idle: whether nothing is in progress any more.
        cut: ends what is in progress in such a way that each call can still say so. May block.
        drain_seconds: how long calls in progress may take to finish.
        started: called once connections are accepted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        *,
        is_idle: Callable[[], bool],
        cut: Callable[[], None],
        drain_seconds: float,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._gate = gate
        self._is_idle = is_idle
        self._cut = cut
        self._drain_seconds = drain_seconds
        self._on_started = started
        self._deadline: float | None = None

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    # Not noted among uvicorn's captured signals: it would raise them again, as if it had been killed.
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = self.force_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Take no more calls, and exit when those in progress are done."""
        if not self._is_idle():
            log.warning("finishing what is in progress, for %g s at most", self._drain_seconds)
        self._deadline = time.monotonic() + self._drain_seconds
        self._gate.close()

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (self._is_idle() or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list | None = None) -> None:
        self._gate.close()
        if not self.force_exit:
            await asyncio.to_thread(self._cut)
            await self._last_words()
            # Pages of the studio listen for news for as long as they are open; web.edge ends them in order.
            for task in list(self.server_state.tasks):
                task.cancel()
        await super().shutdown(sockets)

    async def _last_words(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self._gate.active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
