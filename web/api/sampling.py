"""Fields that chat and completions share: how tokens are picked, how many answers, how they are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from okavango.platform.errors import InputError, UnsupportedError
from okavango.serving.types import SamplingParams
from okavango.web.api.structured import ResponseFormat, StructuredOutputs, guide_of

MAX_CHOICES = 128
"""Answers to one call: OpenAI's own limit of n."""
_SEED = 2**63
_BIAS = 100

Strings = Annotated[list[str] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class StreamOptions(BaseModel):
    """`continuous_usage_stats` is vLLM's: usage so far with every chunk."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    # Padding against eavesdroppers who measure chunks; there is none here.
    include_obfuscation: bool | None = None


class SharedFields(BaseModel):
    """OpenAI's names; those after `structured_outputs` are vLLM's, and `timeout` is ours."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: Strings = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # In JSON, an object's keys are strings, which strict types would not take for numbers.
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, allow_inf_nan=False)
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    # Labels that change no answer.
    user: str | None = None
    # vLLM's, which load generators send; only as NEUTRAL allows.
    skip_special_tokens: bool | None = None
    stop_token_ids: list[int] | None = None
    use_beam_search: bool | None = None

    # Names of old → where it is said now.
    MOVED: ClassVar[Mapping[str, str]] = {
        f"guided_{kind}": f"structured_outputs: {{{kind!r}: ...}}"
        for kind in ("json", "regex", "choice", "grammar")
    }


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a call asks besides its prompt.

    `n`: answers a prompt. `timeout`: seconds, see serving.types.Request. `continuous_usage`: usage so far
    with every chunk.
    """

    model: str
    params: SamplingParams
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    priority: int = 0
    timeout: float | None = None

    def params_of(self, i: int) -> SamplingParams:
        """Of answer i to a prompt. The first one has the seed itself: it is the answer that n = 1 gives."""
        if i == 0 or self.params.seed is None:
            return self.params
        derived = hashlib.sha256(f"{self.params.seed}:{i}".encode()).digest()
        return replace(self.params, seed=int.from_bytes(derived[:8]) >> 1)


def shared_terms(body: SharedFields) -> dict[str, Any]:
    """What of Terms every call says in the same fields; the rest is `params`.

    Raises:
        InputError: stream_options without a stream.
    """
    options = body.stream_options
    if options is not None and not body.stream:
        raise InputError("is only for streams", where="stream_options", remedy="set stream to true")
    return {
        "model": body.model,
        "n": body.n or 1,
        "stream": bool(body.stream),
        "include_usage": bool(options and options.include_usage),
        "continuous_usage": bool(options and options.continuous_usage_stats),
        "priority": body.priority or 0,
        "timeout": body.timeout,
    }


def sampling_params(
    body: SharedFields, *, max_tokens: int | None, logprobs: int | None, names: Mapping[str, str]
) -> SamplingParams:
    """How tokens are picked. `names`: what the caller calls a parameter that has another name here.

    Raises:
        InputError: a value out of its range.
    """
    given = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    try:
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(body.stop or ()),
            top_k=max(0, body.top_k or 0),  # vLLM's -1 is all, too
            logit_bias=_bias(body.logit_bias or {}),
            guide=guide_of(body.response_format, body.structured_outputs),
        )
    except InputError as error:
        error.where = names.get(error.where or "", error.where)
        raise


_SAME_NAMES = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)


def check_neutral(body: BaseModel, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UnsupportedError for a field that asks for more than what is done anyway."""
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            allowed = f"leave it out or send {' or '.join(map(repr, values))}" if values else "leave it out"
            raise UnsupportedError("is not supported with this value", where=name, remedy=allowed)


def _bias(raw: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token, value in raw.items():
        if not (token.isascii() and token.isdecimal()):
            raise InputError(f"{token!r} is not a token id", where="logit_bias")
        if not -_BIAS <= value <= _BIAS:
            raise InputError(
                f"token {token}: must be between -{_BIAS} and {_BIAS}, not {value}", where="logit_bias"
            )
    return tuple((int(token), float(value)) for token, value in raw.items())
