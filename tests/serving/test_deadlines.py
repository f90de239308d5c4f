"""`Request.timeout`: a request ends with what it has, wherever it is, within one step."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from okavango.platform.errors import ConfigError
from okavango.serving.options import EngineOptions
from okavango.serving.tickets import Ticket, late, seconds_left
from okavango.serving.types import Event, FinishReason, SamplingParams

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


class Inbox:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish is not None:
            self._ended.set()

    def last(self) -> Event:
        assert self._ended.wait(30), "it did not end"
        return self.events[-1]


@pytest.fixture
def slow_steps(make_harness):
    """An engine for one sequence at a time, whose answers of 400 tokens take seconds."""
    harness = make_harness(max_sequences=1)
    step = harness.engine.core.step

    def slow() -> None:
        time.sleep(0.02)
        step()

    harness.engine.core.step = slow
    return harness


def submit(harness, timeout: float | None, adapter: str | None = None) -> Inbox:
    inbox = Inbox()
    request = replace(harness.request("go on", adapter, params=LONG), timeout=timeout)
    harness.engine.submit(request, inbox)
    return inbox


def test_a_running_request_ends_with_what_it_has(slow_steps):
    inbox = submit(slow_steps, 0.5)
    last = inbox.last()
    assert last.finish is FinishReason.TIMEOUT
    tokens = [token for event in inbox.events for token in event.tokens]
    assert 0 < len(tokens) == last.usage.completion_tokens < 400
    text = "".join(event.text for event in inbox.events)
    assert text == slow_steps.engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert slow_steps.engine.stats().kv_blocks_used == 0


def test_a_queued_request_ends_while_another_goes_on(slow_steps):
    running = submit(slow_steps, None)
    queued = submit(slow_steps, 0.1)
    assert queued.last() == Event(finish=FinishReason.TIMEOUT, usage=queued.last().usage)
    assert queued.last().usage.completion_tokens == 0
    slow_steps.engine.stop()
    assert running.last().finish is FinishReason.ABORT


def test_a_request_whose_adapter_never_comes_ends_though_no_step_is_made(make_harness, tiny_bundles):
    gate = threading.Event()

    class Never:
        def fetch(self, digest: str):
            assert gate.wait(30)
            return tiny_bundles.fetch(digest)

    harness = make_harness(source=Never())
    inbox = submit(harness, 0.05, "r4")
    assert inbox.last().finish is FinishReason.TIMEOUT
    gate.set()
    assert len(harness.tokens([harness.request("hi", "r4")])[0]) == 12
    assert len(inbox.events) == 1


def test_a_limit_that_is_not_reached_changes_nothing(harness):
    plain = harness.request("hi", "r4")
    limited = replace(harness.request("hi", "r4"), timeout=600.0)
    tokens = harness.tokens([plain, limited])
    assert tokens[0] == tokens[1]


def test_the_nearest_deadline_is_what_the_thread_sleeps_for(harness):
    request = harness.request("hi")
    tickets = [Ticket(request, lambda event: None, 1, deadline) for deadline in (None, 7.0, 5.0)]
    assert seconds_left(tickets, 3.0) == 2.0
    assert seconds_left(tickets, 9.0) == 0.0
    assert seconds_left(tickets[:1], 3.0) is None
    assert late(tickets, 5.0) == [tickets[2]]


def test_shares_that_make_no_sense_are_refused():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"weights\[team\]"):
            EngineOptions(weights=(("team", weight),))
    assert EngineOptions(weights=(("team", 2.0),)).limits.weights == {"team": 2.0}
