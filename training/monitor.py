"""What a run tells (lines, bars, its job's progress and events), and what it is told: to stop.

A run asks at places where it can stop without losing anything; whoever wants it to stop only leaves word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from okavango.platform.catalog.events import Event

# Where a bar cannot be drawn, it becomes a line every so many seconds.
_LINE_SECONDS = 20.0


class Reason(StrEnum):
    """Why a run is to stop; the later ones overrule the earlier."""

    INTERRUPT = "interrupted"
    PAUSE = "paused"
    CANCEL = "cancelled"
    LOST = "lease lost"


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run stopped because it was told to."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


Advance = Callable[..., None]
"""advance(n=1, **shown): n further parts are done; `shown` goes beside the bar and into the progress."""


class Monitor:
    """One run's. `progress` may be read, and `stop` called, by any thread.

    Args:
        console: where lines and bars go; None for a run that nobody watches.

    Attributes:
        listeners: are told every event, by the thread that notes it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(quiet=True)
        self._reasons: set[Reason] = set()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self.listeners: list[Callable[[Event], None]] = []
        self.progress: dict[str, Any] = {}

    def stop(self, reason: Reason) -> None:
        with self._lock:
            self._reasons.add(reason)

    @property
    def reason(self) -> Reason | None:
        """Why to stop, if at all."""
        with self._lock:
            return next((reason for reason in reversed(Reason) if reason in self._reasons), None)

    def check(self) -> None:
        """Raises Stopped if word was left."""
        if self.reason is not None:
            raise Stopped(self.reason)

    def say(self, text: str) -> None:
        """A line, on the console and among the job's events."""
        self._line(text)
        self.note("message", text)

    def note(self, kind: str, message: str, **data: Any) -> None:
        """An event of the job: see catalog.events.Event for the kinds."""
        event = Event(kind, message, data=data or None, at=datetime.now(UTC))
        with self._lock:
            self._events.append(event)
        for tell in self.listeners:
            tell(event)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    @contextmanager
    def taken_events(self) -> Iterator[Sequence[Event]]:
        """Events that were not written yet; they are still to be, where the block does not end well."""
        with self._lock:
            taken, self._events = self._events, []
        try:
            yield taken
        except BaseException:
            with self._lock:
                self._events = taken + self._events
            raise

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        self._console.print(renderable)

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar of `total` parts; the block calls what it yields as they get done."""
        line = _Lines(self._line, label, total) if not self._console.is_terminal else None
        self.progress = {"phase": label, "done": done, "total": total}
        with Progress(*_columns(), console=self._console, disable=line is not None) as bars:
            task = bars.add_task(label, total=total, completed=done, shown="")

            def advance(parts: int = 1, **shown: Any) -> None:
                nonlocal done
                done += parts
                self.progress = {"phase": label, "done": done, "total": total, **shown}
                text = "  ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in shown.items())
                bars.update(task, advance=parts, shown=text)
                if line is not None:
                    line.tell(done, text)

            yield advance


class _Lines:
    def __init__(self, say: Callable[[str], None], label: str, total: int) -> None:
        self._say, self._label, self._total = say, label, total
        self._next = time.monotonic() + _LINE_SECONDS

    def tell(self, done: int, text: str) -> None:
        if time.monotonic() >= self._next or done == self._total:
            self._say(f"{self._label} {done}/{self._total}  {text}".rstrip())
            self._next = time.monotonic() + _LINE_SECONDS


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def describe(values: Mapping[str, float]) -> str:
    """Named numbers in one line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())
