"""The body of a chat request: OpenAI's fields, each honoured or refused, none ignored in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from okavango.modalities.content import Limits, Message
from okavango.platform.errors import InputError
from okavango.serving.types import SamplingParams
from okavango.web.api import sampling
from okavango.web.api.body import parse_body
from okavango.web.api.messages import read_request_messages
from okavango.web.api.sampling import SharedFields, Terms, check_neutral, sampling_params, shared_terms


class ChatRequest(SharedFields):
    """OpenAI's schema, with what the base class adds to it."""

    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Labels that change no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Only as NEUTRAL allows.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# What these fields may be besides null: values that ask for nothing that is not done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **sampling.NEUTRAL,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True, kw_only=True)
class Chat(Terms):
    """A chat request that can be served, its pictures decoded once and found good."""

    messages: tuple[Message, ...]


def parse_chat(raw: bytes, limits: Limits) -> Chat:
    """A request's body → what is asked. Takes CPU time: never on the event loop.

    Raises:
        InputError: the first thing that is wrong, with the field that it is in.
    """
    body = parse_body(ChatRequest, raw)
    check_neutral(body, NEUTRAL)
    terms = shared_terms(body)
    return Chat(**terms, params=_params(body), messages=read_request_messages(body.messages, limits))


def _params(body: ChatRequest) -> SamplingParams:
    names = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return sampling_params(body, max_tokens=_max_tokens(body), logprobs=_logprobs(body), names=names)


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InputError("is only for logprobs", where="top_logprobs", remedy="set logprobs to true")
    return None


def _max_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InputError(
            f"is {new}, and max_tokens is {old}", where="max_completion_tokens", remedy="send one"
        )
    return old if new is None else new
