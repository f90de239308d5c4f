"""Chat through the real server and OpenAI's own client."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, user, wait_until

from okavango.modalities.base import Base
from okavango.modalities.tiny_bundle import picture_bytes

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 450, "extra_body": {"ignore_eos": True}}


def is_idle(server: RunningServer) -> bool:
    stats = server.services.engine.stats()
    return server.services.is_idle() and stats.kv_blocks_used == 0


def counts_of(usage: openai.types.CompletionUsage | None) -> list[Any]:
    """All but what was cached, which is more the second time."""
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    image_tokens = usage.prompt_tokens_details.image_tokens  # type: ignore[attr-defined]
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, image_tokens]


def test_an_answer_has_openais_shape(client: openai.OpenAI, tiny_base: Base) -> None:
    answer = client.chat.completions.create(model="tiny", messages=user("hello"), **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.system_fingerprint == f"fp_{tiny_base.digest[:12]}"
    assert len(answer.choices) == 1
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_an_answer_says_what_made_it(client: openai.OpenAI, server: RunningServer, tiny_bundles: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model="r8", messages=user("hello"), **GREEDY)
    base, digest = server.services.base, tiny_bundles.digests["r8"]
    assert raw.parse().okavango == {  # type: ignore[attr-defined]
        "base": "tiny",
        "base_digest": base.digest,
        "adapter": "r8@1",
        "adapter_digest": digest,
        "features_cached": 0,
    }
    assert raw.parse().model == "r8"
    assert raw.headers["x-okavango-adapter"] == "r8@1"
    assert raw.headers["x-okavango-digest"] == digest
    assert raw.headers["x-request-id"].startswith("req_")


def test_the_bare_base_names_no_adapter(client: openai.OpenAI, server: RunningServer) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=user("hello"), **GREEDY)
    assert "x-okavango-adapter" not in raw.headers
    assert raw.headers["x-okavango-digest"] == server.services.base.digest
    assert raw.parse().okavango["adapter"] is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["tiny", "r4", "r16@1"])
@pytest.mark.parametrize("pictures", [(), (picture_bytes(3), picture_bytes(4))])
def test_a_stream_says_what_the_whole_answer_says(
    client: openai.OpenAI, model: str, pictures: tuple[bytes, ...]
) -> None:
    asked: dict[str, Any] = {"model": model, "messages": user("what is this?", *pictures), **GREEDY}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, usage = stream
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in [*chunks, usage]} == {chunks[0].id}
    assert usage.choices == []
    assert counts_of(usage.usage) == counts_of(whole.usage)
    marked = [i for i, chunk in enumerate(chunks) if hasattr(chunk, "okavango")]
    assert marked == [0, len(chunks) - 1]


def test_a_stream_ends_with_done_and_has_usage_only_where_asked(server: RunningServer) -> None:
    body = {"model": "tiny", "messages": user("hi"), "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in events[:-1])


def test_several_answers_are_those_of_their_seeds(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "r8",
        "messages": user("hello"),
        **GREEDY,
        "temperature": 1.5,
        "seed": 4,
    }
    one = client.chat.completions.create(**asked)
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) == 3
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def cached(usage: openai.types.CompletionUsage | None) -> int | None:
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens


def test_what_was_computed_before_is_told_once_a_prompt(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "messages": user("a prompt that fills some blocks, asked by nobody else"),
        **GREEDY,
    }
    three = client.chat.completions.create(model="r8", **asked, n=3)
    assert cached(three.usage) == 0
    again = client.chat.completions.create(model="r8", **asked, n=3)
    assert again.usage is not None
    assert cached(again.usage) == (again.usage.prompt_tokens - 1) // 16 * 16 > 0
    assert cached(client.chat.completions.create(model="r4", **asked).usage) == 0


def test_while_answers_go_on_nobody_knows_what_was_cached(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model="tiny", messages=user("hello"), n=2, stream=True, stream_options=options, **GREEDY
    )
    counts = [cached(chunk.usage) for chunk in stream]
    assert counts[0] is None
    assert counts[-1] is not None


def test_leaving_a_stream_of_several_frees_all(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.chat.completions.create(model="tiny", messages=user("x"), n=3, stream=True, **LONG)
    next(stream)
    stream.close()
    wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_openais_shape(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "r4", "messages": user("hello"), **GREEDY}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    found = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    assert len(found) == 12
    for each in found:
        assert [len(each.top_logprobs), each.top_logprobs[0].token] == [2, each.token]  # greedy
        assert each.logprob == each.top_logprobs[0].logprob < 0
    text = "".join(
        (choice.delta.content or "") if stream else choice.message.content or "" for choice in choices
    )
    raw = bytes(byte for each in found for byte in each.bytes)
    assert raw.decode(errors="replace").startswith(text[:3])


def test_parameters_of_the_sampler_arrive_there(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": user("hello"), "temperature": 0, "max_tokens": 6}
    forced = client.chat.completions.create(**asked, logit_bias={"65": 100})
    assert len(set(forced.choices[0].message.content or "")) == 1
    choice = client.chat.completions.create(
        **asked, extra_body={"structured_outputs": {"choice": ["maybe", "never"]}}
    ).choices[0]
    assert (choice.message.content, choice.finish_reason) in [("maybe", "stop"), ("never", "stop")]
    shaped = client.chat.completions.create(
        **{**asked, "max_tokens": 60},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "boolean"}, "strict": True},
        },
    )
    assert isinstance(json.loads(shaped.choices[0].message.content or ""), bool)


def test_an_answer_that_is_late_is_an_error_that_no_client_repeats(server: RunningServer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": user("hello"), **LONG}
    asked["extra_body"] = {"ignore_eos": True, "timeout": 1e-4}
    counted = 'okavango_requests_total{model="tiny",status="timeout"}'
    before = server.metric(counted)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="within its timeout") as caught:
            server.client(max_retries=2).chat.completions.create(**asked, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert server.metric(counted) == before + 2
    wait_until(lambda: is_idle(server))


def test_features_are_shared_across_adapters(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": user("what is this?", picture_bytes(99)), **GREEDY}
    cached = [
        client.chat.completions.create(model=model, **asked).okavango["features_cached"]  # type: ignore[attr-defined]
        for model in ("r4", "r8", "tiny")
    ]
    assert cached == [0, 1, 1]


def test_a_seed_repeats_an_answer_and_another_seed_does_not(client: openai.OpenAI) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="r4", messages=user("hello"), seed=seed, max_tokens=24, temperature=1.5
        )
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "r8", "messages": user("hello"), **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    middle = next(char for char in whole[2:] if char.isascii())
    stopped = client.chat.completions.create(**asked, stop=[middle]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index(middle)]
    assert client.chat.completions.create(**asked, stop=middle).choices[0] == stopped


def test_without_a_limit_an_answer_fills_the_context(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=user("hi"), temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == server.services.engine.context
    assert answer.choices[0].finish_reason == "length"


def test_leaving_a_stream_frees_what_it_held(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.chat.completions.create(model="r8", messages=user("hello"), stream=True, **LONG)
    next(stream)
    assert server.services.engine.stats().running == 1
    stream.close()
    wait_until(lambda: is_idle(server))
    aborted = server.metric('okavango_requests_total{model="r8@1",status="abort"}')
    assert aborted >= 1


def test_leaving_before_a_whole_answer_frees_what_it_held(server: RunningServer) -> None:
    body = json.dumps({"model": "r16", "messages": user("hello"), "temperature": 0, "ignore_eos": True})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: server.services.engine.stats().running == 1)
    wait_until(lambda: is_idle(server))
    assert server.metric('okavango_requests_total{model="r16@1",status="abort"}') == 1


def test_leaving_while_the_body_is_on_its_way_frees_the_call(server: RunningServer) -> None:
    left = threading.Event()

    def body() -> Any:
        yield b'{"model": '
        left.wait(0.2)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        httpx.post(
            f"{server.url}/v1/chat/completions", content=body(), headers={"content-type": "application/json"}
        )
    wait_until(lambda: server.services.gate.active == 0)


def test_tokens_and_times_are_measured(client: openai.OpenAI, server: RunningServer) -> None:
    names = [
        'okavango_requests_total{model="r4@1",status="length"}',
        'okavango_tokens_total{adapter="r4@1",kind="prompt"}',
        'okavango_tokens_total{adapter="r4@1",kind="generated"}',
        "okavango_request_seconds_count",
        "okavango_time_to_first_token_seconds_count",
    ]
    before = [server.metric(name) for name in names]
    answer = client.chat.completions.create(model="r4", messages=user("hello"), **GREEDY)
    assert answer.usage is not None
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [1, answer.usage.prompt_tokens, 12, 1, 1]


def test_refusals_are_counted_and_make_no_labels_of_their_own(
    client: openai.OpenAI, server: RunningServer
) -> None:
    samples = [
        f'okavango_requests_total{{model="none",status="{status}"}}'
        for status in ("model_not_found", "invalid_request", "unsupported_media_type")
    ]
    before = [server.metric(sample) for sample in samples]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="made-up-name", messages=user("hi"))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=user("hi"), temperature=9)
    httpx.post(f"{server.url}/v1/chat/completions", content=b"x")
    assert [server.metric(sample) for sample in samples] == [old + 1 for old in before]
    assert "made-up-name" not in server.get("/metrics").text
