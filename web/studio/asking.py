"""One question in progress: answered on a task of its own, looked at as often as a page can show it.

Stopping it, or losing its reader, closes the engine's stream, which frees what the request holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from okavango.platform.errors import OkavangoError
from okavango.serving.types import Event, SamplingParams
from okavango.web.answering import Question, answer, render
from okavango.web.models import Model
from okavango.web.services import Services
from okavango.web.studio.conversation import Provenance, Turn, messages_of
from okavango.web.studio.wording import explain, media_note

log = logging.getLogger("okavango.web.studio")

LOOK_SECONDS = 0.06
"""Between two looks at a growing answer: more than eyes can follow would only take time from the engine."""
ENOUGH_TO_MEASURE = 6
"""Tokens. Over fewer gaps the rate would tell of the moment more than of the model."""
STOPPED = "stopped"


class Asking:
    """Asks the last of `turns`; the others are what was said before. Made on the event loop that serves."""

    def __init__(
        self,
        services: Services,
        model: str,
        turns: tuple[Turn, ...],
        params: SamplingParams,
        principal: str,
    ) -> None:
        self._services = services
        self._name = model
        self._turns = turns
        self._params = params
        self._principal = principal
        self._id = f"studio-{uuid.uuid4().hex}"
        self._model: Model | None = None
        self._notes: tuple[str, ...] = ()
        self._text = ""
        self._tokens = 0
        self._began = self._first = self._last = time.monotonic()
        self._task = asyncio.create_task(self._run())

    async def looks(self) -> AsyncGenerator[Turn, None]:
        """The turn whenever it has grown, and at last as it is for good. Closing this stops the answer."""
        shown = ""
        try:
            while not self._task.done():
                await asyncio.wait([self._task], timeout=LOOK_SECONDS)
                if self._text != shown:
                    shown = self._text
                    yield replace(self._turns[-1], answer=shown)
            yield self._outcome()
        finally:
            self.stop()

    def stop(self) -> None:
        """End the answer where it is. Nothing happens once it has ended."""
        self._task.cancel()

    async def _run(self) -> Event:
        services = self._services
        messages = await asyncio.to_thread(messages_of, self._turns, services.options.media)
        self._model = model = await services.models.resolve(self._name)
        modalities = {medium.modality for message in messages for medium in message.media}
        notes = [
            await asyncio.to_thread(media_note, model, modality, services.catalog)
            for modality in sorted(modalities)
        ]
        self._notes = tuple(note for note in notes if note)
        prompt = await render(services.engine, model, messages)
        question = Question(self._id, model, prompt, self._params, self._principal)
        async with aclosing(answer(services.engine, question, services.metrics)) as events:
            async for event in events:
                self._take(event)
        return event

    def _take(self, event: Event) -> None:
        self._text += event.text
        if event.tokens:
            self._last = time.monotonic()
            if not self._tokens:
                self._first = self._last
            self._tokens += len(event.tokens)

    def _outcome(self) -> Turn:
        turn = replace(self._turns[-1], answer=self._text)
        if self._task.cancelled():
            return replace(turn, made_by=self._provenance(None), fault=_fault_of_stopped(self._text))
        error = self._task.exception()
        if error is None:
            fault = None if self._text else "The answer is empty: the model ended its turn at once."
            return replace(turn, made_by=self._provenance(self._task.result()), fault=fault)
        if not isinstance(error, OkavangoError):
            log.error("%s failed", self._id, exc_info=error)
        return replace(turn, fault=explain(error, self._id))

    def _provenance(self, last: Event | None) -> Provenance | None:
        """None where it was not settled what answers; `last` None where the answer was stopped."""
        if self._model is None:
            return None
        usage = last.usage if last is not None else None
        took = self._last - self._first
        return Provenance(
            model=self._model.ref,
            digest=self._model.digest,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else self._tokens,
            seconds=self._last - self._began,
            tokens_per_second=(self._tokens - 1) / took if self._tokens >= ENOUGH_TO_MEASURE else None,
            media=sum(len(turn.media) for turn in self._turns),
            cached=last.features_cached if last is not None else None,
            ending=str(last.finish) if last is not None else STOPPED,
            notes=self._notes,
        )


def _fault_of_stopped(text: str) -> str | None:
    return None if text else "Stopped before the answer began."
