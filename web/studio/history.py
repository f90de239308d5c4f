"""What has happened to a job, folded from its events: the curve's points, scores, answers, the last lines.

Knows nothing of Gradio. Events are read once each, whoever looks at the job.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from okavango.platform.catalog.records import JobEventRecord
from okavango.platform.catalog.store import Catalog

_PAGE = 1000
_KEPT_LINES = 60
_PACED_STEPS = 20
_KEPT_JOBS = 32


@dataclass
class Answers:
    """A held-out row that is asked at each look. `media`: digests; `by_step`: what was answered."""

    line: int
    question: str
    expected: str
    media: tuple[str, ...]
    by_step: dict[int, str] = field(default_factory=dict)


@dataclass
class History:
    """One job's, so far.

    Attributes:
        last: number of the newest event in it.
        losses, held_out: by step; of a step that was done again after a restart, the later one.
        answers: by line of the held-out data.
        lines: the newest events that are lines for people.
    """

    last: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    answers: dict[int, Answers] = field(default_factory=dict)
    lines: deque[JobEventRecord] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    times: deque[tuple[int, datetime]] = field(default_factory=lambda: deque(maxlen=_PACED_STEPS))

    def add(self, event: JobEventRecord) -> None:
        self.last = event.number
        data = event.data or {}
        match event.kind:
            case "metrics":
                self._measure(data, event.created_at)
            case "sample":
                self._answer(event.message, data)
            case "scores":
                self.scores = dict(data)
                self.lines.append(event)
            case _:
                self.lines.append(event)

    def seconds_left(self, steps: int) -> float | None:
        """By the pace of the last steps; None where there are too few to tell."""
        if len(self.times) < 2:
            return None
        (first, began), (last, ended) = self.times[0], self.times[-1]
        if last <= first:  # an attempt that began anew
            return None
        return max(0, steps - last) * (ended - began).total_seconds() / (last - first)

    def _measure(self, data: dict[str, Any], at: datetime) -> None:
        step = data.get("step")
        if step is None:
            return
        if "train_loss" in data:
            self.losses[step] = data["train_loss"]
            self.times.append((step, at))
        if "valid_loss" in data:
            self.held_out[step] = data["valid_loss"]

    def _answer(self, question: str, data: dict[str, Any]) -> None:
        line = data["line"]
        if line not in self.answers:
            self.answers[line] = Answers(line, question, data["expected"], tuple(data["media"]))
        self.answers[line].by_step[data["step"]] = data["answer"]


class Histories:
    """Histories of the jobs that were looked at last. Safe to share between threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: OrderedDict[str, tuple[threading.Lock, History]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, job_id: str) -> Iterator[History]:
        """A job's history up to now, which nobody changes while the block reads it. Whether the reader may,
        the caller has asked."""
        with self._lock:
            own, history = self._known.setdefault(job_id, (threading.Lock(), History()))
            self._known.move_to_end(job_id)
            while len(self._known) > _KEPT_JOBS:
                self._known.popitem(last=False)
        with own:
            while found := self._catalog.list_events(job_id, after=history.last, limit=_PAGE):
                for event in found:
                    history.add(event)
                if len(found) < _PAGE:
                    break
            yield history
