"""A reply, whole or as server-sent events: what chat and completions share. Their shapes say how it looks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.types import Chosen, Event
from okavango.web.answering import Question, answer_all
from okavango.web.api.origin import Origin
from okavango.web.api.sampling import Terms
from okavango.web.api.sse import DONE, EventStream, sse_event
from okavango.web.problems import problem_of
from okavango.web.services import Services

Events = AsyncGenerator[tuple[int, Event], None]


@dataclass
class Choice:
    """One answer as it grows. `last` is the event that ended it."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    num_tokens: int = 0
    last: Event | None = None

    def add(self, event: Event) -> None:
        self.text += event.text
        self.chosen += event.logprobs
        self.num_tokens += len(event.tokens)
        self.last = event if event.finish is not None else None

    @property
    def mean_logprob(self) -> float:
        return sum(each.logprob for each in self.chosen) / max(1, len(self.chosen))


class Shape(Protocol):
    """How a reply looks. `index` is the choice's."""

    @property
    def headers(self) -> dict[str, str]: ...

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole reply, but for its usage."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice's first chunk, before any token of it."""
        ...

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        """A chunk with an event's text and log probabilities."""
        ...

    def ending(self, index: int, event: Event) -> dict[str, Any]:
        """A choice's last chunk."""
        ...

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk of all, which has the usage and no choice."""
        ...


async def reply(
    questions: Sequence[Question], shape: Shape, terms: Terms, request: Request, services: Services
) -> Response:
    """Ask, and answer as the terms say. A stream waits for its first token, so that what is refused before it
    gets a status of its own."""
    events = answer_all(services.engine, questions, services.metrics)
    usage = _Usage(questions)
    if not terms.stream:
        choices = await _collect(events, len(questions))
        return JSONResponse({**shape.whole(choices), "usage": usage.of(choices)}, headers=shape.headers)
    first = await anext(events)
    stream = _Stream(shape, terms, usage, len(questions))
    return EventStream(stream.run(first, events, request.state.request_id), shape.headers)


def questions_of(
    origin: Origin, prompts: Sequence[Rendered], terms: Terms, each: int, principal: str
) -> list[Question]:
    """`each` questions a prompt, in the order of their choices."""
    count = len(prompts) * each
    return [
        Question(
            origin.id if count == 1 else f"{origin.id}-{index}",
            origin.model,
            prompts[index // each],
            terms.params_of(index % each),
            principal,
            terms.priority,
            terms.timeout,
        )
        for index in range(count)
    ]


@contextmanager
def counted_refusals(metrics: Metrics) -> Iterator[None]:
    """Counts what never becomes a question; from there on web.answering counts. The name that was asked for
    is no label: callers could make as many as they like."""
    try:
        yield
    except OkavangoError as error:
        metrics.count("okavango_requests_total", model="none", status=error.code)
        raise


async def _collect(events: Events, count: int) -> list[Choice]:
    choices = [Choice() for _ in range(count)]
    async with aclosing(events):
        async for index, event in events:
            choices[index].add(event)
    return choices


class _Usage:
    """Token counts: each prompt once, however many answers it has; media's tokens are part of it."""

    def __init__(self, questions: Sequence[Question]) -> None:
        prompts = {id(question.prompt): question.prompt for question in questions}
        self._prompt = sum(len(prompt.tokens) for prompt in prompts.values())
        spans = [span for prompt in prompts.values() for span in prompt.spans]
        self._media = {
            f"{modality}_tokens": sum(span.length for span in spans if span.modality == modality)
            for modality in ("image", "audio")
        }
        self._prompt_of = [id(question.prompt) for question in questions]

    def of(self, choices: Sequence[Choice]) -> dict[str, Any]:
        generated = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": generated,
            "total_tokens": self._prompt + generated,
            "prompt_tokens_details": {
                "cached_tokens": self._cached(choices),
                "features_cached": _features_cached(choices),
                **self._media,
            },
        }

    def _cached(self, choices: Sequence[Choice]) -> int | None:
        """None until all have ended. Answers to one prompt reuse what the first of them computed, and that
        is no saving of the prompt's: the least of theirs is what was there before."""
        least: dict[int, int] = {}
        for prompt, choice in zip(self._prompt_of, choices, strict=True):
            if choice.last is None or choice.last.usage is None:
                return None
            cached = choice.last.usage.cached_tokens
            least[prompt] = min(cached, least.get(prompt, cached))
        return sum(least.values())


def _features_cached(choices: Sequence[Choice]) -> int | None:
    """Media that no encoder had to see; None until all answers have ended. Of answers that share a prompt,
    one may have found what another had encoded."""
    ended = [choice.last.features_cached for choice in choices if choice.last is not None]
    return min(ended) if len(ended) == len(choices) else None


class _Stream:
    """One reply as events."""

    def __init__(self, shape: Shape, terms: Terms, usage: _Usage, count: int) -> None:
        self._shape = shape
        self._terms = terms
        self._usage = usage
        self._choices = [Choice() for _ in range(count)]

    async def run(
        self, first: tuple[int, Event], events: Events, request_id: str
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            for index in range(len(self._choices)):
                if opening := self._shape.opening(index):
                    yield self._encode(opening)
            try:
                if chunks := self._encode_event(*first):
                    yield chunks
                async for found in events:
                    if chunks := self._encode_event(*found):
                        yield chunks
            except OkavangoError as error:
                yield sse_event(problem_of(error, request_id).body)
                return
        if self._terms.include_usage:
            closing = self._shape.closing(self._choices)
            yield sse_event({**closing, "usage": self._usage.of(self._choices)})
        yield DONE

    def _encode_event(self, index: int, event: Event) -> bytes:
        """Nothing for a token that is no text yet."""
        self._choices[index].add(event)
        chunks = b""
        if event.text or event.logprobs:
            chunks += self._encode(self._shape.piece(index, event))
        if event.finish is not None:
            chunks += self._encode(self._shape.ending(index, event))
        return chunks

    def _encode(self, chunk: dict[str, Any]) -> bytes:
        """Where usage is asked for, every chunk has the field, as OpenAI's do."""
        if self._terms.continuous_usage:
            return sse_event({**chunk, "usage": self._usage.of(self._choices)})
        return sse_event({**chunk, "usage": None} if self._terms.include_usage else chunk)
