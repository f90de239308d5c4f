"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from okavango.web.answering import render
from okavango.web.api.body import read_body
from okavango.web.api.chat_request import ChatRequest, parse_chat
from okavango.web.api.chat_response import ChatShape
from okavango.web.api.origin import Origin
from okavango.web.api.replying import counted_refusals, questions_of, reply
from okavango.web.api.sse import while_connected
from okavango.web.services import Services, get_services

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}, "required": True}


@router.post("/v1/chat/completions", openapi_extra={"requestBody": _BODY})
async def create_chat_completion(request: Request, services: Services = Depends(get_services)) -> Response:
    """Answer a conversation, whole or as server-sent events, as OpenAI's API does."""
    options = services.options
    with counted_refusals(services.metrics):
        raw = await read_body(request, options.body_bytes, options.body_seconds)
    return await while_connected(request.receive, _respond(request, raw, services))


async def _respond(request: Request, raw: bytes, services: Services) -> Response:
    with counted_refusals(services.metrics):
        chat = await asyncio.to_thread(parse_chat, raw, services.options.media)
        origin = Origin(chat.model, await services.models.resolve(chat.model), "chatcmpl")
        prompt = await render(services.engine, origin.model, chat.messages)
    shape = ChatShape(origin, services.tokens, reports=chat.params.logprobs is not None)
    questions = questions_of(origin, [prompt], chat, chat.n, request.state.principal)
    return await reply(questions, shape, chat, request, services)
