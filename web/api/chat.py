"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from okavango.platform.errors import OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.types import Event
from okavango.web.answering import Question, answer
from okavango.web.api.body import read_body
from okavango.web.api.chat_request import Chat, ChatRequest, parse_chat
from okavango.web.api.chat_response import Answer
from okavango.web.api.sse import DONE, EventStream, sse_event, while_connected
from okavango.web.problems import problem_of
from okavango.web.services import Services, get_services

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}, "required": True}


@router.post("/v1/chat/completions", openapi_extra={"requestBody": _BODY})
async def create_chat_completion(request: Request, services: Services = Depends(get_services)) -> Response:
    """Answer a conversation, whole or as server-sent events, as OpenAI's API does."""
    options = services.options
    with _counted_refusals(services.metrics):
        raw = await read_body(request, options.body_bytes, options.body_seconds)
    return await while_connected(request.receive, _respond(request, raw, services))


async def _respond(request: Request, raw: bytes, services: Services) -> Response:
    with _counted_refusals(services.metrics):
        chat = await asyncio.to_thread(parse_chat, raw, services.options.media)
        shape = Answer(chat.model, await services.models.resolve(chat.model))
    question = Question(shape.id, shape.model, chat.messages, chat.params, request.state.principal)
    events = answer(services.engine, question, services.metrics)
    if chat.stream:
        return await _stream(events, chat, shape, request.state.request_id)
    return await _whole(events, shape)


@contextmanager
def _counted_refusals(metrics: Metrics) -> Iterator[None]:
    """Counts what never becomes a question; from there on web.answering counts. The name that was asked for
    is no label: callers could make as many as they like."""
    try:
        yield
    except OkavangoError as error:
        metrics.count("okavango_requests_total", model="none", status=error.code)
        raise


async def _whole(events: AsyncGenerator[Event, None], shape: Answer) -> Response:
    text = ""
    async with aclosing(events):
        async for event in events:
            text += event.text
    return JSONResponse(shape.completion(text, event), headers=shape.headers)


async def _stream(
    events: AsyncGenerator[Event, None], chat: Chat, shape: Answer, request_id: str
) -> Response:
    """Waits for the first token, so that what is refused before it gets a status of its own."""
    first = await anext(events)
    return EventStream(_sse(first, events, chat, shape, request_id), shape.headers)


async def _sse(
    first: Event, events: AsyncGenerator[Event, None], chat: Chat, shape: Answer, request_id: str
) -> AsyncGenerator[bytes, None]:
    def encode(chunk: dict[str, Any]) -> bytes:
        # Where usage is asked for, every chunk has the field, as OpenAI's do.
        return sse_event({"usage": None, **chunk} if chat.include_usage else chunk)

    async with aclosing(events):
        yield encode(shape.role_chunk())
        try:
            event = first
            while True:
                if event.text:
                    yield encode(shape.text_chunk(event.text))
                if event.finish is not None:
                    break
                event = await anext(events)
        except OkavangoError as error:
            yield sse_event(problem_of(error, request_id).body)
            return
        yield encode(shape.last_chunk(event))
        if chat.include_usage:
            yield encode(shape.usage_chunk(event))
        yield DONE
