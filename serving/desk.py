"""Where requests stand between `submit` and their last event, and where the step thread hears of them.

One lock guards all of it: tickets, what the step thread has yet to be told, and whether anybody may still
come. A ticket that is no longer registered is out of the game, whoever still has it. Plain Python.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from okavango.platform.errors import BusyError, NotReadyError, OkavangoError
from okavango.serving.tickets import Ticket, late, seconds_left

RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class News:
    """What the step thread has to see to.

    Attributes:
        inbox: tickets that are prepared, or whose readers are gone.
        overdue: tickets whose time is up.
        pins: the adapters that are pinned from now on, by digest with their weights; None: as before.
    """

    inbox: list[Ticket]
    overdue: list[Ticket]
    pins: Mapping[str, Any] | None


class Desk:
    """Tickets by request, `most` at a time. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tickets: dict[str, Ticket] = {}
        self._inbox: list[Ticket] = []
        self._pins: Mapping[str, Any] | None = None
        self._closed: str | None = None
        self._wake = threading.Condition()

    def __len__(self) -> int:
        return len(self._tickets)

    def get(self, request_id: str) -> Ticket | None:
        return self._tickets.get(request_id)

    def holds(self, ticket: Ticket) -> bool:
        return self._tickets.get(ticket.request.id) is ticket

    def all(self) -> list[Ticket]:
        with self._wake:
            return list(self._tickets.values())

    def admit(self, ticket: Ticket, begin: Callable[[Ticket], None] | None = None) -> None:
        """Register a ticket; `begin` is called with it before the desk can close.

        Raises:
            NotReadyError: the desk is closed.
            BusyError: there are too many.
        """
        with self._wake:
            if self._closed is not None:
                raise NotReadyError(self._closed)
            if ticket.request.id in self._tickets:
                raise OkavangoError(f"request {ticket.request.id} is already here")
            if len(self._tickets) >= self._most:
                raise BusyError(f"{len(self._tickets)} requests are here", retry_after=RETRY_AFTER_SECONDS)
            self._tickets[ticket.request.id] = ticket
            if ticket.deadline is not None:
                self._wake.notify()  # the step thread may be asleep, and has a time to wake up now
            if begin is not None:
                begin(ticket)

    def put(self, ticket: Ticket) -> None:
        """A ticket is prepared."""
        with self._wake:
            self._inbox.append(ticket)
            self._wake.notify()

    def pin(self, pins: Mapping[str, Any]) -> None:
        """These adapters are pinned now, and none else; the last call counts."""
        with self._wake:
            self._pins = pins
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """A ticket's reader is gone. Unknown ids are ignored."""
        with self._wake:
            ticket = self._tickets.get(request_id)
            if ticket is not None:
                self._abort(ticket)

    def remove(self, ticket: Ticket) -> bool:
        """Strike a ticket off; whether it was still there."""
        with self._wake:
            if not self.holds(ticket):
                return False
            del self._tickets[ticket.request.id]
            return True

    def close(self, reason: str) -> None:
        """Take no more tickets, and abort those that are here. The first reason is the one that is told."""
        with self._wake:
            self._closed = self._closed or reason
            for ticket in self._tickets.values():
                self._abort(ticket)
            self._wake.notify()

    def wait(self, *, has_work: bool) -> News | None:
        """For the step thread: what there is to see to, at once if it has work anyway; None when the desk is
        closed, and neither work nor news are left."""
        with self._wake:
            while not (self._has_news() or has_work or self._late()):
                self._wake.wait(seconds_left(self._tickets.values(), time.monotonic()))
            inbox, self._inbox = self._inbox, []
            pins, self._pins = self._pins, None
            if self._closed and not inbox and not has_work:
                return None
            return News(inbox, self._late(), pins)

    def _abort(self, ticket: Ticket) -> None:
        ticket.aborted = True
        self._inbox.append(ticket)
        self._wake.notify()

    def _has_news(self) -> bool:
        return bool(self._inbox or self._closed or self._pins is not None)

    def _late(self) -> list[Ticket]:
        return late(self._tickets.values(), time.monotonic())
