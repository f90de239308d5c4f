"""The body of an embeddings request: OpenAI's, and beside texts the content parts of chat for media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from okavango.modalities.content import Limits, Media, Text
from okavango.platform.errors import InputError, OkavangoError
from okavango.web.api.body import parse_body
from okavango.web.api.messages import read_request_messages

MAX_INPUTS = 2048
"""OpenAI's own limit."""
MAX_MEDIA = 64
_FORMS = "a text, token ids, or a content part as in chat"

Input = str | tuple[int, ...] | Media


class EmbeddingRequest(BaseModel):
    """OpenAI's schema. Each input is a text, a list of token ids, or a content part as in chat: text,
    image_url or input_audio."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    # A label that changes no answer.
    user: str | None = None


@dataclass(frozen=True)
class Asked:
    """`dimensions`: how wide the caller takes the space to be, if it said so."""

    model: str
    inputs: tuple[Input, ...]
    in_base64: bool
    dimensions: int | None


def parse_embedding(raw: bytes, limits: Limits) -> Asked:
    """A request's body → what is asked, every medium decoded once and found good. Takes CPU time.

    Raises:
        InputError: the first thing that is wrong, with the field that it is in.
    """
    body = parse_body(EmbeddingRequest, raw)
    places = _places(body.input)
    if len(places) > MAX_INPUTS:
        raise InputError(f"{len(places):,} inputs, over the limit of {MAX_INPUTS:,}", where="input")
    media = sum(isinstance(each, Mapping) and each.get("type") != "text" for _, each in places)
    if media > MAX_MEDIA:
        raise InputError(f"{media:,} media, over the limit of {MAX_MEDIA} a request", where="input")
    inputs = tuple(_input(each, where, limits) for where, each in places)
    return Asked(body.model, inputs, body.encoding_format == "base64", body.dimensions)


def _places(raw: Any) -> list[tuple[str, Any]]:
    """(path, input) of each: one stands alone, or several in a list. A list of numbers is one text's ids."""
    if not isinstance(raw, list) or (raw and _is_token(raw[0])):
        return [("input", raw)]
    if not raw:
        raise InputError("is empty", where="input")
    return [(f"input[{i}]", each) for i, each in enumerate(raw)]


def _input(raw: Any, where: str, limits: Limits) -> Input:
    if isinstance(raw, str):
        if len(raw) > limits.text_chars:
            raise InputError(f"over the limit of {limits.text_chars:,} characters", where=where)
        return raw
    if isinstance(raw, list):
        for at, token in enumerate(raw):
            if not _is_token(token):
                raise InputError(f"must be a token id, not {token!r:.40}", where=f"{where}[{at}]")
        return tuple(raw)
    if isinstance(raw, Mapping):
        return _part(raw, where, limits)
    raise InputError(f"must be {_FORMS}, not {raw!r:.40}", where=where)


def _part(raw: Mapping[str, Any], where: str, limits: Limits) -> Input:
    """One content part, read as chat reads it."""
    try:
        alone = replace(limits, media_per_request=1)
        (message,) = read_request_messages([{"role": "user", "content": [raw]}], alone)
    except OkavangoError as error:
        error.where = (error.where or "").replace("messages[0].content[0]", where, 1) or where
        raise
    part = message.parts[0]
    return part.text if isinstance(part, Text) else part


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
