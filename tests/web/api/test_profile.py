"""A trace of the engine's next steps, taken while it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from server_fixtures import RunningServer, user, wait_until

ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": user("hello"),
    "temperature": 0,
    "max_tokens": 12,
    "extra_body": {"ignore_eos": True},
}


def profiling(server: RunningServer, steps: int) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/engine/profile?steps={steps}", timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: server.services.engine.profiler._wanted is not None)
    return thread, answers


def test_the_next_steps_are_traced(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    thread, answers = profiling(server, 4)
    busy = httpx.post(f"{server.url}/v1/engine/profile")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "conflict")
    plain = server.client().chat.completions.create(**ASKED).choices[0].message.content
    thread.join()
    [answer] = answers
    assert answer.status_code == 200
    names = [event.get("name") for event in json.loads(answer.content)["traceEvents"]]
    for name in ("okavango.step", "okavango.schedule", "okavango.run", "okavango.sample"):
        assert names.count(name) == 4, name
    assert any(str(name).startswith("aten::") for name in names)
    assert server.client().chat.completions.create(**ASKED).choices[0].message.content == plain


def test_who_gives_up_leaves_the_profiler_free(
    make_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("okavango.web.api.profile.PATIENCE_SECONDS", 0.05)
    server = make_server()
    late = httpx.post(f"{server.url}/v1/engine/profile")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready")
    assert "fewer than 10 steps" in late.json()["error"]["message"]
    server.client().chat.completions.create(**ASKED)
    monkeypatch.undo()
    thread, answers = profiling(server, 1)
    server.client().chat.completions.create(**ASKED)
    thread.join()
    assert answers[0].status_code == 200


@pytest.mark.parametrize("steps", ["0", "101", "many"])
def test_how_many_steps_has_bounds(server: RunningServer, steps: str) -> None:
    answer = httpx.post(f"{server.url}/v1/engine/profile?steps={steps}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")


def test_only_who_has_a_key_may_trace(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(keys="secret")
    assert httpx.post(f"{server.url}/v1/engine/profile").status_code == 401


def test_a_profiler_that_fails_fails_its_caller_alone(
    make_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that somebody else in the process uses."""

    def fail(_: Any) -> None:
        raise RuntimeError("another profiler is running")

    server = make_server()
    monkeypatch.setattr("okavango.serving.profiling.profile.start", fail)
    thread, answers = profiling(server, 1)
    assert server.client().chat.completions.create(**ASKED).choices
    thread.join()
    assert answers[0].status_code == 500
    assert "another profiler is running" in answers[0].json()["error"]["message"]


def test_a_steps_anatomy_is_in_the_metrics(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    usage = server.client().chat.completions.create(**ASKED).usage
    assert usage is not None
    wait_until(lambda: server.metric('okavango_step_tokens_total{phase="decode"}') == 11)
    assert server.metric('okavango_step_tokens_total{phase="prefill"}') == usage.prompt_tokens
    assert server.metric("okavango_batch_adapters_count") == server.metric("okavango_batch_tokens_count")
    assert server.metric("okavango_batch_adapters_sum") == 0
    phases = ("schedule", "load", "run", "sample", "deliver")
    took = [server.metric(f'okavango_phase_seconds_total{{phase="{name}"}}') for name in phases]
    assert all(took)
    assert sum(took) <= server.metric("okavango_step_seconds_sum")
