"""Whatever is wrong with a request: one clear error of OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, Site, data_url, user, wait_until

from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle

PNG = picture_bytes(1)
CHAT = "/v1/chat/completions"
HELLO = user("hello")
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 450, "extra_body": {"ignore_eos": True}}
URL_FIELD = "messages[0].content[1].image_url.url"


@pytest.fixture(autouse=True)
def goes_on(server: RunningServer, client: openai.OpenAI) -> Iterator[None]:
    """After each of these tests the server answers, and nothing is left in the engine."""
    yield
    answer = client.chat.completions.create(model="r4", messages=user("hello", PNG), max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens in (1, 2)
    wait_until(lambda: server.services.engine.stats().kv_blocks_used == 0)


def huge(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def image(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("gpt-9", "model_not_found", "the model 'gpt-9' does not exist"),
        ("r44", "model_not_found", "did you mean r4"),
        ("tinny", "model_not_found", "did you mean tiny"),
        ("nobody@3", "model_not_found", "the model 'nobody@3' does not exist"),
        ("r4@7", "model_not_found", "no such version: r4@7"),
        ("r4@prod", "model_not_found", "no such alias: r4@prod"),
        ("r4@", "model_not_found", "names no adapter version"),
    ],
)
def test_a_model_that_is_not_there(
    client: openai.OpenAI, model: str, code: str, said: str, stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, stream=stream)
    assert (caught.value.code, caught.value.param) == (code, "model")
    assert said in caught.value.message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("asked", "code", "param", "said"),
    [
        ({"messages": user("long " * 200)}, "context_length_exceeded", "messages", "limit of 512 tokens"),
        ({"max_tokens": 510}, "context_length_exceeded", "messages", "510 to generate"),
        (
            {"messages": image(data_url(huge(8_000, 8_000)))},
            "invalid_media",
            URL_FIELD,
            "8,000 × 8,000 pixels, over the limit of 40,000,000",
        ),
        (
            {"messages": image(data_url(PNG + b"\0" * 20 * 1024 * 1024))},
            "invalid_media",
            URL_FIELD,
            "bytes, over the limit of 20,971,520",
        ),
        (
            {"messages": image(data_url(PNG[: len(PNG) // 2]))},
            "invalid_media",
            URL_FIELD,
            "truncated or damaged",
        ),
        ({"messages": image(data_url(PNG, "text/plain"))}, "invalid_media", URL_FIELD, "type text/plain"),
        ({"messages": image(data_url(b"GIF?"))}, "invalid_media", URL_FIELD, "not a PNG, JPEG, WebP"),
        ({"messages": image("data:image/png;base64,@@@")}, "invalid_media", URL_FIELD, "not valid base64"),
        (
            {"messages": image("https://example.com/cat.png")},
            "invalid_media",
            URL_FIELD,
            "only data URLs are accepted, not https",
        ),
        ({"messages": image("/etc/passwd")}, "invalid_media", URL_FIELD, "not a path"),
        ({"messages": []}, "invalid_prompt", "messages", "is empty"),
        ({"messages": [{"role": "robot", "content": ""}]}, "invalid_prompt", "messages[0].role", "'robot'"),
        ({"temperature": 3}, "invalid_request", "temperature", "between 0 and 2"),
        ({"store": True}, "unsupported", "store", "leave it out or send False"),
        ({"extra_body": {"temprature": 0}}, "invalid_request", "temprature", "did you mean temperature?"),
    ],
)
def test_a_request_that_is_wrong(
    client: openai.OpenAI, asked: dict[str, Any], code: str, param: str, said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "r4", "messages": HELLO, **asked}, stream=stream)
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert said in error.message
    assert str(error.request_id).startswith("req_")


def test_an_adapter_of_another_base(
    make_server: Callable[..., RunningServer], site: Site, tmp_path: Path
) -> None:
    other = write_tiny_base(tmp_path / "other", name="other", seed=1)
    write_tiny_bundle(tmp_path / "bundle", other, rank=4)
    replace(site, base=other).publish("foreign", tmp_path / "bundle")
    server = make_server()
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="foreign", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("adapter_of_another_base", "model")
    assert "made over base 'other' (decoder" in caught.value.message
    assert "runs base 'tiny' (decoder" in caught.value.message
    with pytest.raises(openai.NotFoundError, match="base 'other' is not served here"):
        server.client().chat.completions.create(model="other", messages=HELLO)
    assert [model.id for model in server.client().models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "said"), [(b"{", "not valid JSON: EOF"), (b"[1]", "object"), (b"[" * 100_000, "not valid JSON")]
)
def test_a_body_that_is_no_request(server: RunningServer, body: bytes, said: str) -> None:
    answer = httpx.post(server.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_content_type(server: RunningServer, kind: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO})
    answer = httpx.post(server.url + CHAT, content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_a_body_that_is_too_large(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny", messages=user("x" * (65 << 20)))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert "67,108,864 bytes" in caught.value.message


def test_a_body_that_is_too_large_and_does_not_say_so(server: RunningServer) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(66):
            yield b" " * (1 << 20)

    answer = httpx.post(server.url + CHAT, content=body(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_a_client_that_hangs_up_within_its_body(server: RunningServer) -> None:
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        wait_until(lambda: server.services.gate.active == 1)
    wait_until(lambda: server.services.gate.active == 0)


def test_a_body_that_does_not_come(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(body_seconds=0.1)
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/moderations", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
        ("GET", "/v1/adapters/nobody", 404, "not_found"),
    ],
)
def test_a_place_that_is_none(server: RunningServer, method: str, path: str, status: int, code: str) -> None:
    answer = httpx.request(method, server.url + path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-request-id"].startswith("req_")


def test_extreme_but_legal_values_harm_nobody(client: openai.OpenAI) -> None:
    for extreme in ({"seed": -(2**63)}, {"seed": 2**63 - 1}, {"temperature": 1e-40}, {"top_p": 1e-40}):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, **extreme)


def test_a_full_queue_says_so_and_empties(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(engine={"max_sequences": 1, "max_waiting": 1})
    client = server.client()

    def ask() -> None:
        client.chat.completions.create(model="tiny", messages=HELLO, **LONG)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    wait_until(lambda: server.services.engine.stats().running == 1)
    threads[1].start()
    wait_until(lambda: server.services.gate.active == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        ask()
    assert (caught.value.code, caught.value.type) == ("busy", "rate_limit_error")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    ask()


def test_a_failure_of_ours_tells_only_where_to_look(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the secret of the house")

    with monkeypatch.context() as patch:
        patch.setattr(server.services.engine.renderer, "prompt", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
    request_id = str(caught.value.request_id)
    assert "secret" not in caught.value.response.text
    assert request_id in caught.value.message
    logged = [record for record in caplog.records if request_id in record.getMessage() and record.exc_info]
    assert "the secret of the house" in str(logged[0].exc_info[1])


def test_a_damaged_picture_never_reaches_an_encoder(server: RunningServer, client: openai.OpenAI) -> None:
    sample = 'okavango_encoder_runs_total{modality="image"}'
    before = server.metric(sample)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="r4", messages=image(data_url(PNG[: len(PNG) // 2])))
    assert server.metric(sample) == before
