"""Requests that come, go and stop at bad moments: every one that was taken has exactly one last event."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from okavango.platform.errors import ContextLengthError, NotReadyError, OkavangoError
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import Event, FinishReason, SamplingParams

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


class Inbox:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish is not None:
            self.ended.set()

    def last(self) -> Event:
        assert self.ended.wait(30), "it did not end"
        return self.events[-1]


class SlowSource:
    """Bundles that come when the test lets them. `asked` counts the fetches that have begun."""

    def __init__(self, bundles) -> None:
        self._bundles = bundles
        self.gate = threading.Event()
        self.asked = threading.Semaphore(0)

    def fetch(self, digest: str):
        self.asked.release()
        assert self.gate.wait(30)
        return self._bundles.fetch(digest)


@pytest.fixture
def slow(tiny_bundles) -> Iterator[SlowSource]:
    source = SlowSource(tiny_bundles)
    yield source
    source.gate.set()


@pytest.fixture
def slow_harness(make_harness, slow):
    return make_harness(source=slow)


@contextmanager
def running(target) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=target)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive()


def test_what_is_being_prepared_when_the_engine_stops_is_aborted(slow_harness, slow):
    inboxes = [Inbox() for _ in range(4)]  # two being prepared, two behind them
    for inbox in inboxes:
        slow_harness.engine.submit(slow_harness.request("hi", "r4"), inbox)
    assert slow.asked.acquire(timeout=30)
    with running(slow_harness.engine.stop):
        assert [inbox.last().finish for inbox in inboxes] == [FinishReason.ABORT] * 4
        slow.gate.set()
    assert [len(inbox.events) for inbox in inboxes] == [1] * 4


def test_requests_that_come_while_the_engine_stops_are_refused_or_ended(make_harness):
    harness = make_harness(max_waiting=10_000)
    requests = [harness.request("hi", [None, "r4"][i % 2]) for i in range(600)]
    taken: list[Inbox] = []
    begun = threading.Event()

    def come() -> None:
        for i, request in enumerate(requests):
            inbox = Inbox()
            try:
                harness.engine.submit(request, inbox)
            except NotReadyError:
                return
            taken.append(inbox)
            if i == 50:
                begun.set()

    with running(come):
        assert begun.wait(30)
        harness.engine.stop()
    assert len(taken) > 50
    for inbox in taken:
        inbox.last()
        assert sum(event.finish is not None for event in inbox.events) == 1


def test_an_engine_that_never_started_tells_those_who_wait(tiny_base, tiny_bundles, harness):
    engine = Engine(tiny_base, tiny_bundles, EngineOptions(dtype="float32", kv_bytes=1 << 22))
    inboxes = [Inbox(), Inbox()]
    for adapter, inbox in zip((None, "r4"), inboxes, strict=True):
        engine.submit(harness.request("hi", adapter), inbox)
    engine.stop()
    assert [inbox.last().finish for inbox in inboxes] == [FinishReason.ABORT] * 2


def test_an_id_may_be_used_again_once_its_request_has_ended(slow_harness, slow):
    engine = slow_harness.engine
    first, second = Inbox(), Inbox()
    request = slow_harness.request("hi", "r4")
    engine.submit(request, first)
    assert slow.asked.acquire(timeout=30)
    engine.abort(request.id)
    assert first.last().finish is FinishReason.ABORT
    engine.submit(replace(request, adapter=None, params=LONG), second)
    slow.gate.set()  # the first one's preparation ends only now
    assert second.last().finish is FinishReason.LENGTH
    assert len(first.events) == 1


def test_an_id_that_is_here_already_is_refused_and_the_first_goes_on(harness):
    inbox = Inbox()
    request = harness.request("hi", params=LONG)
    harness.engine.submit(request, inbox)
    with pytest.raises(OkavangoError, match="already here"):
        harness.engine.submit(request, lambda event: None)
    assert inbox.last().finish is FinishReason.LENGTH


def test_a_request_that_was_aborted_while_its_adapter_loads_comes_to_nothing(slow_harness, slow):
    engine = slow_harness.engine
    added, add = [], engine.core.add
    engine.core.add = lambda sequence: (added.append(sequence), add(sequence))
    inbox, other = Inbox(), Inbox()
    request = slow_harness.request("hi", "r16")
    engine.submit(request, inbox)
    engine.submit(slow_harness.request("hi", "r16"), other)
    assert slow.asked.acquire(timeout=30)
    engine.abort(request.id)
    assert inbox.last().finish is FinishReason.ABORT
    slow.gate.set()
    assert other.last().finish is FinishReason.LENGTH
    engine.stop()
    assert len(added) == len(inbox.events) == 1
    assert not slow.asked.acquire(blocking=False), "one load served both"


def test_as_many_as_may_be_here_may_come_at_once(tiny_base, tiny_bundles, harness):
    options = EngineOptions(dtype="float32", kv_bytes=1 << 22, max_sequences=4, max_waiting=2)
    engine = Engine(tiny_base, tiny_bundles, options)
    inboxes = [Inbox() for _ in range(6)]
    for inbox in inboxes:
        engine.submit(harness.request("hi"), inbox)
    engine.start()
    assert [inbox.last().finish for inbox in inboxes] == [FinishReason.LENGTH] * 6
    engine.stop()


def test_a_request_whose_sequence_cannot_be_made_ends(harness, caplog):
    inbox = Inbox()
    harness.engine.submit(harness.request("hi", params=SamplingParams(seed="seven")), inbox)  # type: ignore[arg-type]
    assert inbox.last().finish is FinishReason.ERROR
    assert "could not be prepared" in str(inbox.last().error)
    assert harness.engine.stats().preparing == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_died_tells_everybody_and_takes_no_more(slow_harness, slow):
    engine = slow_harness.engine
    preparing, running = Inbox(), Inbox()
    engine.submit(slow_harness.request("hi", "r4"), preparing)

    def die() -> None:
        raise SystemError("a bug of ours")

    engine.core.step = die
    engine.submit(slow_harness.request("hi"), running)
    for inbox in (preparing, running):
        assert inbox.last().finish is FinishReason.ERROR
    assert "restarted" in str(running.last().error)
    with pytest.raises(NotReadyError, match="failed"):
        engine.submit(slow_harness.request("hi"), lambda event: None)
    engine._thread.join(30)
    assert not engine.is_running


def test_too_little_kv_memory_is_named(make_harness):
    harness = make_harness(kv_bytes=1 << 16)
    with pytest.raises(ContextLengthError, match="--kv-memory"):
        harness.engine.submit(harness.request("x" * 300), lambda event: None)
