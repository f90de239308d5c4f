"""One question to one model: rendered, run, measured and logged. What the API and the studio share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from okavango.modalities.content import Message
from okavango.platform.errors import NotReadyError, OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.engine import Engine
from okavango.serving.types import Event, FinishReason, Request, SamplingParams
from okavango.web.models import Model

log = logging.getLogger("okavango.web.answers")


@dataclass(frozen=True)
class Question:
    """`id` is unique; the model is resolved already, so that what answers is settled."""

    id: str
    model: Model
    messages: tuple[Message, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    principal: str = "local"


async def answer(engine: Engine, question: Question, metrics: Metrics) -> AsyncGenerator[Event, None]:
    """The answer's events, the last with its finish and usage. Closing the generator aborts the request.

    Raises:
        PromptError, ContextLengthError: the conversation cannot be answered.
        BusyError: the queue is full.
        OkavangoError: the engine failed, or stopped midway.
    """
    meter = _Meter(question, metrics)
    try:
        model = question.model
        prompt = await asyncio.to_thread(engine.renderer.prompt, question.messages, model.system)
        request = Request(question.id, prompt, model.adapter, question.params, question.principal)
        async with aclosing(cast("AsyncGenerator[Event, None]", engine.stream(request))) as events:
            async for event in events:
                meter.see(event, len(prompt.tokens))
                _raise_failure(event)
                yield event
    except OkavangoError as error:
        meter.status = error.code
        raise
    finally:
        meter.end()


def _raise_failure(event: Event) -> None:
    if event.finish is FinishReason.ERROR:
        raise event.error or OkavangoError("the engine failed")
    if event.finish is FinishReason.ABORT:
        raise NotReadyError("the server stopped before the answer was complete; ask again")


class _Meter:
    """Measures one answer. `status` is how it ended; abort if nobody said otherwise."""

    def __init__(self, question: Question, metrics: Metrics) -> None:
        self.status: str = FinishReason.ABORT
        self._question = question
        self._metrics = metrics
        self._began = time.monotonic()
        self._prompt = self._generated = self._cached = 0
        self._first: float | None = None

    def see(self, event: Event, prompt_tokens: int) -> None:
        if self._first is None and event.tokens:
            self._first = time.monotonic() - self._began
            self._prompt = prompt_tokens
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
