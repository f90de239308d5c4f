"""Fields of a chat request: honoured, or refused with the field named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_fixtures import data_url, user

from okavango.modalities.content import Limits, Media, Text
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import InputError, MediaError, UnsupportedError
from okavango.serving.types import Guide, SamplingParams
from okavango.web.api.chat_request import NEUTRAL, Chat, parse_chat

PNG = picture_bytes(1)
HELLO = {"model": "tiny", "messages": user("hello")}


def parse(**fields: Any) -> Chat:
    return parse_chat(json.dumps({**HELLO, **fields}).encode(), Limits())


def test_what_is_left_out_is_as_openai_has_it() -> None:
    chat = parse()
    assert chat.params == SamplingParams(None, temperature=1.0, top_p=1.0, seed=None, stop=())
    assert (chat.model, chat.stream, chat.include_usage) == ("tiny", False, False)


def test_every_field_that_is_honoured_arrives() -> None:
    chat = parse(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=3,
        stop=["a", "b"],
        ignore_eos=True,
        min_tokens=2,
        top_k=5,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "7": 1.5},
        logprobs=True,
        top_logprobs=4,
        structured_outputs={"regex": "a+"},
        n=3,
        priority=-2,
        timeout=1.5,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert chat.params == SamplingParams(
        7,
        temperature=0.0,
        top_p=0.5,
        seed=3,
        stop=("a", "b"),
        ignore_eos=True,
        min_tokens=2,
        top_k=5,
        min_p=0.1,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias=((5, -100.0), (7, 1.5)),
        logprobs=4,
        guide=Guide("regex", "a+"),
    )
    assert (chat.n, chat.priority, chat.timeout) == (3, -2, 1.5)
    assert (chat.stream, chat.include_usage, chat.continuous_usage) == (True, True, True)


def test_pictures_arrive_as_they_were_sent() -> None:
    chat = parse(messages=user("what?", PNG))
    assert chat.messages[0].parts == (Media("image", PNG), Text("what?"))


def test_one_stop_string_is_a_list_of_one() -> None:
    assert parse(stop="end").params.stop == ("end",)
    assert parse(stop=None).params.stop == ()


def test_both_names_of_the_limit_may_agree() -> None:
    assert parse(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_value_that_asks_for_nothing_is_fine(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        assert parse(**{name: value}) == parse()


ASKING = {
    "audio": {"voice": "alloy"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "service_tier": "flex",
    "skip_special_tokens": False,
    "stop_token_ids": [3],
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "use_beam_search": True,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_would_change_the_answer_and_is_not_served_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="leave it out") as caught:
        parse(**{name: ASKING[name]})
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"model": ""}, "model", "at least 1 character"),
        ({"model": 3}, "model", "valid string"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"temperature": 3}, "temperature", "between 0 and 2, not 3"),
        ({"temperature": "0"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "max_tokens is 3"),
        ({"stop": ["a", 2]}, "stop[1]", "valid string"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for streams"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "no such field"),
        ({"temprature": 0}, "temprature", r"no such field \(did you mean temperature\?\)"),
        ({"colour": "red"}, "colour", "no such field"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "between 0 and 1, not 2"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "'a' is not a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "token 5: must be between -100 and 100"),
        ({"logit_bias": {"5": None}}, "logit_bias.5", "valid number"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20, not 21"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"priority": 0.5}, "priority", "valid integer"),
        (
            {"stream": True, "stream_options": {"includ_usage": True}},
            "stream_options.includ_usage",
            "mean include_",
        ),
    ],
)
def test_a_fault_names_its_field(fields: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse(**fields)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "EOF"),
        (b"{", "line 1 column"),
        (b'{"model": "tiny",\n  "messages": [,]}', "line 2 column"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"model": "tiny", "messages": ["\\ud800"]}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "object"),
        (b"null", "object"),
        (b'{"messages": []}', "model: is missing"),
        (b'{"model": "tiny"}', "messages: is missing"),
        (b'{"model": "tiny", "messages": [], "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "messages": [], "top_p": Infinity}', "top_p"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_chat(body, Limits())


def test_one_picture_too_many_is_refused_before_it_is_decoded() -> None:
    messages = user("three", PNG, PNG, b"no picture at all")
    with pytest.raises(MediaError, match="over the limit of 2 media") as caught:
        parse_chat(json.dumps({**HELLO, "messages": messages}).encode(), Limits(media_per_request=2))
    assert caught.value.where == "messages[0].content[2].image_url.url"


def test_a_media_type_does_not_make_a_picture() -> None:
    url = data_url(b"<svg></svg>", "image/svg+xml")
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(MediaError, match="not a PNG, JPEG, WebP, GIF or BMP picture"):
        parse(messages=[{"role": "user", "content": parts}])


def test_keys_that_clients_send_back_and_that_say_nothing_are_fine() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "tool_calls": None}
    messages = [{"role": "user", "content": "hello", "name": "ana"}, answer, *user("and?")]
    assert [message.text for message in parse(messages=messages).messages] == ["hello", "hi", "and?"]


def test_a_pictures_detail_changes_nothing() -> None:
    [message] = user("what?", PNG)
    message["content"][0]["image_url"]["detail"] = "low"
    assert parse(messages=[message]) == parse(messages=user("what?", PNG))


@pytest.mark.parametrize(
    ("message", "where", "said"),
    [
        ({"nmae": "ana"}, "messages[0].nmae", "did you mean name?"),
        ({"name": 3}, "messages[0].name", "must be a string"),
        ({"tool_calls": [{"id": "1"}]}, "messages[0].tool_calls", "not supported"),
        ({"content": [{"type": "text", "text": "x", "txt": 1}]}, "messages[0].content[0].txt", "mean text?"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": data_url(PNG), "detial": "low"}}]},
            "messages[0].content[0].image_url.detial",
            "did you mean detail?",
        ),
        (
            {"content": [{"type": "image_url", "image_url": {"url": data_url(PNG), "detail": "sharp"}}]},
            "messages[0].content[0].image_url.detail",
            "one of auto, low, high",
        ),
    ],
)
def test_a_key_that_nobody_would_read_is_refused(message: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse(messages=[{"role": "user", "content": "hello", **message}])
    assert caught.value.where == where


def test_the_first_of_several_answers_is_the_only_answer_of_one() -> None:
    chat = parse(seed=5, n=3)
    seeds = [chat.params_of(i).seed for i in range(3)]
    assert seeds[0] == parse(seed=5).params_of(0).seed == 5
    assert len(set(seeds)) == 3
    assert seeds == [parse(seed=5, n=3).params_of(i).seed for i in range(3)]
    assert [parse(n=2).params_of(i).seed for i in range(2)] == [None, None]


def test_what_vllm_calls_all_tokens_is_all() -> None:
    assert parse(top_k=-1).params.top_k == 0
