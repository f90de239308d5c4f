"""POST /v1/completions: prompts as they are, without a chat template."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import ContextLengthError
from okavango.web.api.body import read_body
from okavango.web.api.completion_request import Completion, CompletionRequest, Prompt, parse_completion
from okavango.web.api.completion_response import CompletionShape
from okavango.web.api.origin import Origin
from okavango.web.api.replying import counted_refusals, questions_of, reply
from okavango.web.api.sse import while_connected
from okavango.web.api.tokens import tokens_of
from okavango.web.services import Services, get_services

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}, "required": True}


@router.post("/v1/completions", openapi_extra={"requestBody": _BODY})
async def create_completion(request: Request, services: Services = Depends(get_services)) -> Response:
    """Continue texts or token ids, whole or as server-sent events, as OpenAI's older API does."""
    options = services.options
    with counted_refusals(services.metrics):
        raw = await read_body(request, options.body_bytes, options.body_seconds)
    return await while_connected(request.receive, _respond(request, raw, services))


async def _respond(request: Request, raw: bytes, services: Services) -> Response:
    with counted_refusals(services.metrics):
        asked = await asyncio.to_thread(parse_completion, raw)
        origin = Origin(asked.model, await services.models.resolve(asked.model), "cmpl")
        prompts = await asyncio.to_thread(_rendered, asked, services)
    shape = CompletionShape(
        origin,
        services.tokens,
        each=asked.best_of,
        kept=asked.n,
        echoes=tuple(_text(prompt, services) for prompt in asked.prompts) if asked.echo else (),
        reports=asked.reports,
    )
    questions = questions_of(origin, prompts, asked, asked.best_of, request.state.principal)
    try:
        return await reply(questions, shape, asked, request, services)
    except ContextLengthError as error:
        error.where = "prompt"
        raise


def _rendered(asked: Completion, services: Services) -> list[Rendered]:
    many = len(asked.prompts) > 1
    tokenizer, special = services.engine.tokenizer, asked.add_special_tokens
    return [
        Rendered(tokens_of(prompt, tokenizer, f"prompt[{i}]" if many else "prompt", special=special))
        for i, prompt in enumerate(asked.prompts)
    ]


def _text(prompt: Prompt, services: Services) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(services.engine.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))
