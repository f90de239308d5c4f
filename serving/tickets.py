"""A request between `submit` and its last event: how long it may get, and when its time is up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from okavango.platform.errors import ContextLengthError
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


def most_tokens(request: Request, context: int, longest: int | None) -> int:
    """Tokens that a request may generate, where its memory for keys and values holds `longest` (None: any).

    Raises:
        ContextLengthError: prompt and answer do not fit the context, or the memory.
    """
    prompt, wanted = len(request.prompt.tokens), request.params.max_tokens
    limit = min(context, longest or context)
    if prompt + (wanted or 1) > limit:
        asked = f" and {wanted} to generate" if wanted else ""
        more = "" if limit == context else ", or give the server more --kv-memory"
        raise ContextLengthError(
            f"{prompt} prompt tokens{asked} exceed the limit of {limit} tokens",
            where="messages",
            remedy=f"shorten the conversation or lower max_tokens{more}",
        )
    return wanted or limit - prompt


def late(tickets: Iterable[Ticket], now: float) -> list[Ticket]:
    """Tickets whose time is up."""
    return [ticket for ticket in tickets if ticket.deadline is not None and ticket.deadline <= now]


def seconds_left(tickets: Iterable[Ticket], now: float) -> float | None:
    """Until the first ticket's time is up; None if none has a limit."""
    return min((max(0.0, t.deadline - now) for t in tickets if t.deadline is not None), default=None)
