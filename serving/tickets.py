"""A request between `submit` and its last event, and when its time is up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from okavango.serving.sequence import Sequence
from okavango.serving.types import Event, Request

Sink = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """`deadline`: when it ends as it is, on the clock of whoever made the ticket; None means never."""

    request: Request
    sink: Sink
    max_tokens: int
    deadline: float | None = None
    sequence: Sequence | None = None
    aborted: bool = False


def late(tickets: Iterable[Ticket], now: float) -> list[Ticket]:
    """Tickets whose time is up."""
    return [ticket for ticket in tickets if ticket.deadline is not None and ticket.deadline <= now]


def seconds_left(tickets: Iterable[Ticket], now: float) -> float | None:
    """Until the first ticket's time is up; None if none has a limit."""
    return min((max(0.0, t.deadline - now) for t in tickets if t.deadline is not None), default=None)
