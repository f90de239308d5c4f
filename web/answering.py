"""Questions to one model: run, measured and logged. What the API and the studio share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from okavango.modalities.content import Message
from okavango.modalities.encoders import make_renderer
from okavango.modalities.prompt import Rendered
from okavango.platform.errors import DeadlineError, NotReadyError, OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.engine import Engine
from okavango.serving.types import Event, FinishReason, Request, SamplingParams
from okavango.web.models import Model

log = logging.getLogger("okavango.web.answers")


@dataclass(frozen=True)
class Question:
    """`id` is unique; the model is resolved already, so that what answers is settled. `priority` and
    `timeout` are serving.types.Request's."""

    id: str
    model: Model
    prompt: Rendered
    params: SamplingParams = field(default_factory=SamplingParams)
    principal: str = "local"
    priority: int = 0
    timeout: float | None = None


async def render(engine: Engine, model: Model, messages: Sequence[Message]) -> Rendered:
    """A conversation as the model takes it, the adapter's own system prompt included.

    Raises:
        PromptError: the conversation cannot be rendered.
        MediaError: a medium's length cannot be told.
    """
    renderer = make_renderer(engine.base, engine.tokenizer, model.heads) if model.heads else engine.renderer
    return await asyncio.to_thread(renderer.prompt, messages, model.system)


async def answer(engine: Engine, question: Question, metrics: Metrics) -> AsyncGenerator[Event, None]:
    """The answer's events, the last with its finish and usage. Closing the generator aborts the request.

    Raises:
        ContextLengthError: prompt and answer do not fit the context.
        BusyError: the queue is full.
        DeadlineError: it was not done within its timeout.
        OkavangoError: the engine failed, or stopped midway.
    """
    meter = _Meter(question, metrics)
    request = Request(
        question.id,
        question.prompt,
        question.model.adapter,
        question.params,
        question.principal,
        question.priority,
        question.timeout,
    )
    try:
        async with aclosing(cast("AsyncGenerator[Event, None]", engine.stream(request))) as events:
            async for event in events:
                meter.see(event)
                _raise_failure(event, question)
                yield event
    except OkavangoError as error:
        meter.status = error.code
        raise
    finally:
        meter.end()


async def answer_all(
    engine: Engine, questions: Sequence[Question], metrics: Metrics
) -> AsyncGenerator[tuple[int, Event], None]:
    """(index of the question, event) as they come. Closing the generator aborts all requests.

    Raises:
        OkavangoError: as `answer` does; the first that fails ends the others.
    """
    arrived: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    async def pump(index: int, question: Question) -> None:
        try:
            async with aclosing(answer(engine, question, metrics)) as events:
                async for event in events:
                    arrived.put_nowait((index, event))
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, question)) for index, question in enumerate(questions)]
    left = len(tasks)
    try:
        while left:
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            yield found
            left -= found[1].finish is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_failure(event: Event, question: Question) -> None:
    match event.finish:
        case FinishReason.ERROR:
            raise event.error or OkavangoError("the engine failed")
        case FinishReason.ABORT:
            raise NotReadyError("the server stopped before the answer was complete; ask again")
        case FinishReason.TIMEOUT:
            raise DeadlineError(f"the answer was not complete within its timeout of {question.timeout:g} s")


class _Meter:
    """Measures one answer. `status` is how it ended; abort if nobody said otherwise."""

    def __init__(self, question: Question, metrics: Metrics) -> None:
        self.status: str = FinishReason.ABORT
        self._question = question
        self._metrics = metrics
        self._began = time.monotonic()
        self._prompt = self._generated = self._cached = 0
        self._first: float | None = None

    def see(self, event: Event) -> None:
        if self._first is None and event.tokens:
            self._first = time.monotonic() - self._began
            self._prompt = len(self._question.prompt.tokens)
        self._generated += len(event.tokens)
        if event.finish is not None:
            self.status, self._cached = event.finish, event.features_cached

    def end(self) -> None:
        question, metrics, name = self._question, self._metrics, self._question.model.ref
        took = time.monotonic() - self._began
        metrics.count("okavango_requests_total", model=name, status=str(self.status))
        metrics.count("okavango_tokens_total", self._prompt, kind="prompt", adapter=name)
        metrics.count("okavango_tokens_total", self._generated, kind="generated", adapter=name)
        metrics.observe("okavango_request_seconds", took)
        if self._first is not None:
            metrics.observe("okavango_time_to_first_token_seconds", self._first)
        log.info(
            "%s for %s: %s %s answered with %d tokens to %d (%d features cached), %s after %.3f s",
            question.id,
            question.principal,
            name,
            question.model.digest[:12],
            self._generated,
            self._prompt,
            self._cached,
            self.status,
            took,
        )
