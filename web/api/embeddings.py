"""POST /v1/embeddings: texts, pictures and sounds in the space that adapter or base was trained with."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from okavango.modalities.content import Media
from okavango.platform.errors import ContextLengthError, InputError
from okavango.serving.embedding import Embedded
from okavango.serving.embedding import Input as EngineInput
from okavango.web.api.body import read_body
from okavango.web.api.embedding_request import Asked, EmbeddingRequest, Input, parse_embedding
from okavango.web.api.origin import Origin
from okavango.web.api.replying import counted_refusals
from okavango.web.api.sse import while_connected
from okavango.web.api.tokens import tokens_of
from okavango.web.services import Services, get_services

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": EmbeddingRequest.model_json_schema()}}, "required": True}


@router.post("/v1/embeddings", openapi_extra={"requestBody": _BODY})
async def create_embeddings(request: Request, services: Services = Depends(get_services)) -> Response:
    """Vectors of texts, token ids, pictures and sounds: near each other where they mean the same."""
    options = services.options
    with counted_refusals(services.metrics):
        raw = await read_body(request, options.body_bytes, options.body_seconds)
        return await while_connected(request.receive, _respond(raw, services))


async def _respond(raw: bytes, services: Services) -> Response:
    asked = await asyncio.to_thread(parse_embedding, raw, services.options.media)
    origin = Origin(asked.model, await services.models.resolve(asked.model), "embd")
    inputs = await asyncio.to_thread(_tokenized, asked.inputs, services)
    embedded = await services.engine.embed(inputs, origin.model.adapter)
    width = embedded.vectors.shape[1]
    if asked.dimensions not in (None, width):
        raise InputError(f"{origin.model.ref} gives vectors of {width}", where="dimensions")
    metrics, name = services.metrics, origin.model.ref
    metrics.count("okavango_requests_total", model=name, status="embedded")
    metrics.count("okavango_tokens_total", sum(embedded.tokens), kind="prompt", adapter=name)
    return JSONResponse(_body(asked, origin, embedded), headers=origin.headers)


def _tokenized(inputs: Sequence[Input], services: Services) -> list[EngineInput]:
    engine = services.engine
    found: list[EngineInput] = []
    for i, each in enumerate(inputs):
        if isinstance(each, Media):
            found.append(each)
            continue
        where = f"input[{i}]" if len(inputs) > 1 else "input"
        tokens = tokens_of(each, engine.tokenizer, where, special=False)
        if len(tokens) > engine.context:
            raise ContextLengthError(
                f"{len(tokens):,} tokens, over the context of {engine.context:,}", where=where
            )
        found.append(tokens)
    return found


def _body(asked: Asked, origin: Origin, embedded: Embedded) -> dict[str, Any]:
    total = sum(embedded.tokens)
    media = {
        f"{modality}_tokens": sum(
            count
            for each, count in zip(asked.inputs, embedded.tokens, strict=True)
            if isinstance(each, Media) and each.modality == modality
        )
        for modality in ("image", "audio")
    }
    details = {"features_cached": embedded.features_cached, **media}
    return {
        "object": "list",
        "model": origin.requested,
        "data": [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(_vectors(embedded, in_base64=asked.in_base64))
        ],
        "usage": {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": details},
        "okavango": origin.describe(embedded.features_cached),
    }


def _vectors(embedded: Embedded, *, in_base64: bool) -> list[Any]:
    """Lists of numbers, or float32 in base64, little-endian: what OpenAI's own client asks for."""
    if not in_base64:
        return list(embedded.vectors.tolist())
    rows = embedded.vectors.numpy().astype("<f4")
    return [base64.b64encode(row.tobytes()).decode() for row in rows]
