"""The body of a completions request: OpenAI's older API, where a prompt is text or token ids as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from okavango.platform.errors import InputError, UnsupportedError
from okavango.serving.types import SamplingParams
from okavango.web.api import sampling
from okavango.web.api.body import parse_body
from okavango.web.api.sampling import (
    MAX_CHOICES,
    SharedFields,
    Terms,
    check_neutral,
    sampling_params,
    shared_terms,
)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

Prompt = str | tuple[int, ...]


def _kind(value: Any) -> str:
    """By the first element, so that a fault is told of the form that was meant."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "many_tokens"
    if isinstance(first, int):
        return "tokens"
    return "text" if isinstance(value, str) else "texts"


Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[list[int], Tag("tokens")]
    | Annotated[list[list[int]], Tag("many_tokens")],
    Discriminator(_kind),
]


class CompletionRequest(SharedFields):
    """OpenAI's schema, with what the base class adds to it. `add_special_tokens` is vLLM's: whether a text
    gets what the tokenizer puts before it (a beginning-of-sequence token, if any)."""

    prompt: Prompts
    max_tokens: int | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    # Only as NEUTRAL allows.
    suffix: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {**sampling.NEUTRAL, "suffix": ("",)}


@dataclass(frozen=True, kw_only=True)
class Completion(Terms):
    """A completions request that can be served. `best_of`: answers to pick `n` from, a
    prompt. `reports`: whether log probabilities were asked for; best_of needs them in any case."""

    prompts: tuple[Prompt, ...]
    best_of: int = 1
    reports: bool = False
    echo: bool = False
    add_special_tokens: bool = True


def parse_completion(raw: bytes) -> Completion:
    """A request's body → what is asked.

    Raises:
        InputError: the first thing that is wrong, with the field that it is in.
    """
    body = parse_body(CompletionRequest, raw)
    check_neutral(body, NEUTRAL)
    if body.echo and body.logprobs is not None:
        raise UnsupportedError(
            "is not supported with echo: nothing is known of a prompt's own tokens",
            where="logprobs",
            remedy="leave out one of them",
        )
    terms = shared_terms(body)
    prompts = _prompts(body.prompt)
    best_of = _best_of(body, terms["n"])
    if len(prompts) * best_of > MAX_CHOICES:
        raise InputError(
            f"{len(prompts)} prompts of {best_of} answers each, over the limit of {MAX_CHOICES} answers",
            where="prompt",
        )
    return Completion(
        **terms,
        params=_params(body, best_of > terms["n"]),
        prompts=prompts,
        best_of=best_of,
        reports=body.logprobs is not None,
        echo=bool(body.echo),
        add_special_tokens=body.add_special_tokens is not False,
    )


def _params(body: CompletionRequest, compares: bool) -> SamplingParams:
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    logprobs = 0 if compares and body.logprobs is None else body.logprobs
    return sampling_params(body, max_tokens=limit, logprobs=logprobs, names={})


def _best_of(body: CompletionRequest, n: int) -> int:
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise InputError(f"must be at least n, which is {n}, not {best_of}", where="best_of")
    if best_of > n and body.stream:
        raise InputError("cannot be streamed: the best is known at the end", where="best_of")
    return best_of


def _prompts(raw: Any) -> tuple[Prompt, ...]:
    if isinstance(raw, str):
        return (raw,)
    if raw and isinstance(raw[0], int):
        return (tuple(raw),)
    if not raw:
        raise InputError("is empty", where="prompt")
    return tuple(each if isinstance(each, str) else tuple(each) for each in raw)
