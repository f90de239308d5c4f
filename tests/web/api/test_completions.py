"""Completions through the real server and OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, user

GREEDY: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "max_tokens": 12,
    "extra_body": {"ignore_eos": True},
}


def text(client: openai.OpenAI, **asked: Any) -> str:
    return client.completions.create(**{**GREEDY, **asked}).choices[0].text


def test_a_completion_has_openais_shape(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(prompt="hello", **GREEDY)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert answer.usage is not None
    prompt = len(server.services.engine.tokenizer("hello")["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.okavango["base"] == "tiny"  # type: ignore[attr-defined]


def test_a_prompt_is_taken_as_it_is(client: openai.OpenAI, server: RunningServer) -> None:
    """No template is put around it: the chat's own rendering gives the chat's answer."""
    asked = {**GREEDY, "max_tokens": 9}
    chat = client.chat.completions.create(messages=user("hello"), **asked).choices[0].message.content
    engine = server.services.engine
    rendered = engine.tokenizer.apply_chat_template(user("hello"), tokenize=False, add_generation_prompt=True)
    assert client.completions.create(prompt=rendered, **asked).choices[0].text == chat
    assert text(client, prompt="hello", max_tokens=9) != chat


def test_text_and_its_tokens_are_the_same_prompt(client: openai.OpenAI, server: RunningServer) -> None:
    tokens = server.services.engine.tokenizer("once upon")["input_ids"]
    for model in ("tiny", "r8"):
        assert text(client, model=model, prompt=tokens) == text(client, model=model, prompt="once upon")


def test_every_prompt_has_its_answers_in_order(client: openai.OpenAI) -> None:
    prompts = ["one", "two", "three"]
    alone = [text(client, prompt=prompt) for prompt in prompts]
    answer = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [each for each in alone for _ in range(2)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6 * 12
    assert answer.usage.prompt_tokens == len("onetwothree")  # a byte a token, and each prompt once


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    plain = text(client, prompt="hello")
    assert text(client, prompt="hello", echo=True) == f"hello{plain}"
    tokens = [[104, 105], [106]]
    echoed = client.completions.create(prompt=tokens, echo=True, **GREEDY).choices
    own = client.completions.create(prompt=tokens, **GREEDY).choices
    assert all(
        with_prompt.text.endswith(without.text) for with_prompt, without in zip(echoed, own, strict=True)
    )
    assert all(
        len(with_prompt.text) > len(without.text) for with_prompt, without in zip(echoed, own, strict=True)
    )


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, echo: bool) -> None:
    asked: dict[str, Any] = {"prompt": ["one", "two"], "n": 2, "echo": echo, "seed": 3, **GREEDY}
    asked |= {"temperature": 1.0, "logprobs": None if echo else 2}
    whole = client.completions.create(**asked)
    *chunks, usage = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    texts, reasons, tokens = [""] * 4, [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []  # type: ignore[operator]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    if not echo:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]  # type: ignore[union-attr]


def test_log_probabilities_have_openais_older_shape(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(prompt="hello", logprobs=3, **GREEDY).choices
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.top_logprobs is not None
    assert found.token_logprobs is not None
    assert len(found.tokens) == len(found.top_logprobs) == 12
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3  # greedy: the token itself is one of them
        assert top[token] == logprob == max(top.values())
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    assert sorted(found.text_offset) == found.text_offset


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "prompt": "hello", "temperature": 1.5, "seed": 7}
    found = client.completions.create(**asked, n=4, logprobs=0).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = sorted(found, key=mean, reverse=True)[:2]
    kept = client.completions.create(**asked, n=2, best_of=4)
    assert [choice.text for choice in kept.choices] == [choice.text for choice in best]
    assert [choice.logprobs for choice in kept.choices] == [None, None]
    assert kept.usage is not None
    assert kept.usage.completion_tokens == 4 * 12


def test_what_was_computed_before_is_told_for_each_prompt(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "model": "r16"}
    old, new = "the cache has seen this text once before", "but this one, as long as that, is new to it"

    def cached(prompt: str | list[str]) -> int | None:
        usage = client.completions.create(**asked, prompt=prompt).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert [cached(old), cached([old, new]), cached([old, new])] == [0, 32, 64]


def test_usage_so_far_comes_with_every_chunk_where_asked(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "temperature": 0}
    lines = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert {event["usage"]["prompt_tokens"] for event in events} == {5}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": [[1], []]}, "prompt[1]", "is empty"),
        ({"prompt": [1, 100_000]}, "prompt[1]", "there is no token 100000"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]", "there is no token -1"),
        ({"prompt": "a" * 5000}, "prompt", "exceed the limit"),
        ({"prompt": "a", "logit_bias": {"100000": 1}}, "logit_bias", "no token 100000"),
    ],
)
def test_a_fault_is_told_with_its_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.completions.create(**{**GREEDY, **fields})
    assert caught.value.param == param


def test_one_answer_too_many_for_the_queue_ends_the_others(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(engine={"max_sequences": 2, "max_waiting": 1})
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(prompt="hello", n=4, stream=stream, **GREEDY)
    assert server.client().completions.create(prompt="hello", n=3, **GREEDY).choices[2].text
    assert server.services.is_idle()
