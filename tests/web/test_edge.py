"""Errors that come when part of the answer is out already, and what the log says of calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, user, wait_until

GREEDY: dict[str, Any] = {
    "model": "tiny",
    "messages": user("hello"),
    "temperature": 0,
    "max_tokens": 40,
    "extra_body": {"ignore_eos": True},
}


def break_after(server: RunningServer, steps: int) -> None:
    """The engine's forward pass fails once it has made so many steps."""
    runner = server.services.engine.core.runner
    run, count = runner.run, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == steps:
            raise RuntimeError("the accelerator is gone")
        return run(*args, **kwargs)

    runner.run = failing  # type: ignore[method-assign]


def test_a_failure_midway_is_an_error_event(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    break_after(server, 5)
    chunks: list[Any] = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(server.client().chat.completions.create(**GREEDY, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "the engine failed in this step" in caught.value.message
    assert server.metric('okavango_requests_total{model="tiny",status="error"}') == 1
    assert server.client().chat.completions.create(**GREEDY).usage.completion_tokens == 40  # type: ignore[union-attr]


def test_an_error_event_ends_the_stream(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    break_after(server, 5)
    body = {**GREEDY, **GREEDY["extra_body"], "stream": True}
    del body["extra_body"]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.text.rstrip().splitlines()[-1].startswith('data: {"error":{"message":')


def test_a_failure_before_the_first_token_has_a_status(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    for stream in (False, True):
        break_after(server, 1)
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().chat.completions.create(**GREEDY, stream=stream)
        assert caught.value.message.endswith("the engine failed in this step")


def test_a_failure_that_nobody_foresaw_cuts_a_stream(
    make_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("okavango.web.api.chat_response.ChatShape.ending", fail)
    server = make_server()
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
        list(server.client().chat.completions.create(**GREEDY, stream=True))
    assert server.services.is_idle()


def test_the_log_has_a_line_a_call_and_one_an_answer(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "okavango.web")
    answer = server.client().chat.completions.create(**{**GREEDY, "model": "r4"})
    server.get("/healthz")

    def found() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("okavango.web")]

    wait_until(lambda: len(found()) >= 2)
    lines = found()
    assert len(lines) == 2
    digest = answer.okavango["adapter_digest"][:12]  # type: ignore[attr-defined]
    assert lines[0].startswith(f"{answer.id} for local: r4@1 {digest} answered with 40 tokens to ")
    assert " POST /v1/chat/completions → 200 in " in lines[1]
    assert lines[1].endswith(" for local")


def test_what_is_turned_away_at_the_door_is_counted(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(keys="secret")
    server.services.gate.limit = 0
    asked = {key: value for key, value in GREEDY.items() if key != "extra_body"}
    with pytest.raises(openai.RateLimitError):
        server.client("secret").chat.completions.create(**asked)
    server.services.gate.limit = 9
    with pytest.raises(openai.AuthenticationError):
        server.client("guess").chat.completions.create(**asked)
    httpx.get(f"{server.url}/v1/models")
    samples = server.get("/metrics", auth=("", "secret")).text.splitlines()
    counted = [line for line in samples if line.startswith("okavango_requests_total")]
    assert sorted(counted) == [
        'okavango_requests_total{model="none",status="busy"} 1.0',
        'okavango_requests_total{model="none",status="invalid_api_key"} 1.0',
    ]
