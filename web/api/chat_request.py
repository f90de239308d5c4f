"""The body of a chat request: OpenAI's fields, each honoured or refused, none ignored in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from okavango.modalities.content import Limits, Message
from okavango.platform.errors import InputError, UnsupportedError
from okavango.serving.types import SamplingParams
from okavango.web.api.body import parse_body
from okavango.web.api.messages import read_request_messages


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    # Padding against eavesdroppers who measure chunks; there is none here.
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """OpenAI's schema; `ignore_eos` is an addition, for benchmarks."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    # Labels that change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Only as NEUTRAL allows.
    audio: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    metadata: Any = None
    modalities: Any = None
    n: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# What these fields may be besides null: values that ask for nothing that is not done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Chat:
    """A chat request that can be served, its pictures decoded once and found good."""

    model: str
    messages: tuple[Message, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool


def parse_chat(raw: bytes, limits: Limits) -> Chat:
    """A request's body → what is asked. Takes CPU time: never on the event loop.

    Raises:
        InputError: the first thing that is wrong, with the field that it is in.
    """
    body = parse_body(ChatRequest, raw)
    _check_neutral(body)
    options = body.stream_options
    if options is not None and not body.stream:
        raise InputError("is only for streams", where="stream_options", remedy="set stream to true")
    return Chat(
        model=body.model,
        params=_params(body),
        messages=read_request_messages(body.messages, limits),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
    )


def _check_neutral(body: ChatRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            allowed = f"leave it out or send {' or '.join(map(repr, neutral))}" if neutral else "leave it out"
            raise UnsupportedError("is not supported with this value", where=name, remedy=allowed)


def _params(body: ChatRequest) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=_max_tokens(body),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=tuple(body.stop or ()),
            ignore_eos=body.ignore_eos,
        )
    except InputError as error:
        if error.where == "max_tokens" and body.max_completion_tokens is not None:
            error.where = "max_completion_tokens"
        raise


def _max_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InputError(
            f"is {new}, and max_tokens is {old}", where="max_completion_tokens", remedy="send one"
        )
    return old if new is None else new
