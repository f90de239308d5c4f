"""The load client against real sockets: what it reads out of a reply, whatever the pieces it comes in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from client import Call, Client, Reply, api_of, error_text
from timing import Trace

CALL = Call("m", "completions", b"{}", wanted=3)


def sse(*events: Any) -> bytes:
    return (
        b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    )


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


def delta(value: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": value}, "finish_reason": finish}]}


def trace_of(*pieces: tuple[float, bytes], status: int = 200, is_stream: bool = True) -> Trace:
    return Reply(CALL, 0.0, 9.0, status, is_stream, pieces).trace()


def test_an_event_has_the_time_of_the_piece_that_completes_it() -> None:
    body = sse(text("a"), text("b"), text("", "length"))
    middle = body.index(b"\n\n") + 20  # inside the second event
    trace = trace_of((1.0, body[:middle]), (2.0, body[middle:]))
    assert (trace.times, trace.tokens, trace.error) == ((1.0, 2.0), 2, None)


def test_chat_roles_and_empty_pieces_are_no_tokens() -> None:
    body = sse(delta(""), delta(None), delta("a"), delta("b"), delta(None, "stop"))
    assert trace_of((1.0, body)).tokens == 2


def test_usage_counts_rather_than_pieces() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    trace = trace_of((1.0, sse(text("a"), text("bc", "length"), usage)))
    assert (trace.tokens, trace.prompt_tokens) == (3, 7)


def test_an_answer_that_comes_whole_has_no_first_token() -> None:
    body = json.dumps({**text("abc", "length"), "usage": {"completion_tokens": 3, "prompt_tokens": 1}})
    trace = trace_of((1.0, body[:9].encode()), (2.0, body[9:].encode()), is_stream=False)
    assert (trace.tokens, trace.first, trace.decode_rate) == (3, None, None)


@pytest.mark.parametrize(
    ("body", "status", "is_stream", "message"),
    [
        (b'{"error": {"message": "no such model"}}', 404, False, "404 no such model"),
        (b"<h1>Bad gateway</h1>", 502, False, "502 <h1>Bad gateway</h1>"),
        (sse(text("a"), {"error": {"message": "gone"}}), 200, True, "gone"),
        (sse(text("a")), 200, True, "the stream ended before the answer did"),
        (b"data: {\n\n", 200, True, "not JSON: b'{'"),
        (b'{"choices": []}', 200, False, "the answer has no usage"),
    ],
)
def test_what_is_no_answer_is_an_error(body: bytes, status: int, is_stream: bool, message: str) -> None:
    trace = trace_of((1.0, body), status=status, is_stream=is_stream)
    assert str(trace.error).startswith(message)
    assert (trace.tokens, trace.times) == (0, ())


def test_a_server_that_is_not_there_is_an_error_of_the_request() -> None:
    async def ask() -> Reply:
        async with Client("http://127.0.0.1:1", None, 5.0) as client:
            return await client.ask(CALL)

    assert str(asyncio.run(ask()).trace().error).startswith("ConnectError")


def test_errors_of_other_forms_are_shown_as_they_are() -> None:
    assert error_text(b'{"error": "busy"}') == "busy"
    assert error_text(b'{"detail": "Not Found"}') == '{"detail": "Not Found"}'


def test_v1_is_added_to_an_address_without_a_path() -> None:
    assert {api_of(url) for url in ("http://h:1", "http://h:1/", "http://h:1/v1/")} == {"http://h:1/v1"}
    assert api_of("https://h/v3/") == "https://h/v3"
