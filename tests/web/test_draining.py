"""Told to stop, the server finishes what it has begun and takes nothing new."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, user, wait_until

from okavango.platform.errors import BusyError, NotReadyError
from okavango.web.draining import Gate

LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": user("hello"),
    "temperature": 0,
    "max_tokens": 450,
    "extra_body": {"ignore_eos": True},
}


def test_a_gate_counts_who_is_inside() -> None:
    gate = Gate(limit=2)
    with gate.pass_through(), gate.pass_through():
        assert gate.active == 2
        with pytest.raises(BusyError), gate.pass_through():
            pass
    assert gate.active == 0


def test_a_closed_gate_lets_out_and_not_in() -> None:
    gate = Gate(limit=2)
    with gate.pass_through():
        gate.close()
        with pytest.raises(NotReadyError), gate.pass_through():
            pass
        assert gate.active == 1
    assert gate.active == 0


def test_what_has_begun_is_finished_and_nothing_new_is_taken(
    make_server: Callable[..., RunningServer],
) -> None:
    server = make_server()
    client = server.client()
    stream = client.chat.completions.create(**LONG, stream=True)
    first = next(stream)
    server.server.drain()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**LONG)
    assert caught.value.status_code == 503
    assert "retry-after" in caught.value.response.headers
    assert "shutting down" in caught.value.message
    assert server.get("/readyz").json() == {"status": "shutting down"}
    assert server.get("/readyz").status_code == 503
    assert server.get("/healthz").status_code == 200
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    wait_until(server.is_ended)
    assert not server.services.engine.is_running
    with pytest.raises(httpx.ConnectError):
        server.get("/healthz")


def test_an_idle_server_ends_at_once(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(drain_seconds=3600)
    server.server.drain()
    wait_until(server.is_ended, seconds=5)


def test_what_takes_too_long_is_told_and_cut(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(drain_seconds=0)
    core = server.services.engine.core
    step, held = core.step, threading.Event()

    def slow_step() -> None:
        held.wait(0.1)
        step()

    core.step = slow_step  # type: ignore[method-assign]
    client = server.client()
    stream = client.chat.completions.create(**LONG, stream=True)
    next(stream)
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(client.chat.completions.create, **LONG)
        wait_until(lambda: server.services.gate.active == 2)
        server.server.drain()
        with pytest.raises(openai.APIError, match="the server stopped before the answer was complete"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server stopped before") as caught:
            whole.result()
    assert caught.value.status_code == 503
    wait_until(server.is_ended)
    assert server.services.is_idle()


def test_pages_that_listen_for_news_do_not_hold_the_server(
    make_server: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(studio=True)
    with httpx.stream("GET", f"{server.url}/studio/gradio_api/heartbeat/some-page") as page:
        lines = page.iter_lines()
        assert next(lines).startswith("data:")
        server.server.drain()
        assert not [line for line in lines if line]
    wait_until(server.is_ended, seconds=5)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
