"""A request's body: bounded in size and time, JSON, and checked against a pydantic model fault by fault."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from okavango.platform.errors import InputError
from okavango.web.problems import HttpError

Body = TypeVar("Body", bound=BaseModel)
_FORMED = ("prompt", "response_format")


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body's bytes.

    Raises:
        HttpError: not JSON by its content type, over `limit` bytes, or slower than `seconds`.
    """
    _check_content_type(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _collect(request, limit)
    except TimeoutError:
        raise HttpError(
            408, "request_timeout", f"the body did not arrive within {seconds:g} seconds"
        ) from None


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """The body as a pydantic model, types taken strictly.

    Raises:
        InputError: malformed JSON, or the first field that is wrong.
    """
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise _fault(kind, error.errors(include_url=False)[0]) from error


def field_path(location: tuple[int | str, ...]) -> str:
    """("stop", 0) → stop[0]. Of a field with several forms, pydantic names the form after it; we do not."""
    path = ""
    for step in location[:1] + location[2:] if location[:1] and location[0] in _FORMED else location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


async def _collect(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _check_content_type(request: Request) -> None:
    """Also what keeps a web page's form from posting here: no form can send this type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content type is {kind or 'missing'}, and application/json is expected"
        raise HttpError(415, "unsupported_media_type", message)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "request_too_large", f"the body is over the limit of {limit:,} bytes")


def _fault(kind: type[BaseModel], fault: ErrorDetails) -> InputError:
    place, message = field_path(fault["loc"]), fault["msg"]
    match fault["type"]:
        case "json_invalid":
            return InputError(f"the body is not valid JSON: {fault['ctx']['error']}")
        case "extra_forbidden":
            return InputError("no such field", where=place, remedy=_nearest(kind, fault["loc"]))
        case "missing":
            return InputError("is missing", where=place)
    return InputError(message[:1].lower() + message[1:], where=place or None)


def _nearest(kind: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """What was perhaps meant: of the body's own fields, or of those of the objects in the field's place."""
    name = str(location[-1])
    moved: Mapping[str, str] = getattr(kind, "MOVED", {})
    if len(location) == 1 and name in moved:
        return f"send {moved[name]}"
    known = (
        _fields(kind)
        if len(location) == 1
        else _fields_within(kind.model_fields[str(location[0])].annotation)
    )
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else None


def _fields(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _fields_within(annotation: Any) -> list[str]:
    """Fields of every model that an annotation mentions, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        within = (_fields_within(field.annotation) for field in annotation.model_fields.values())
        return [*_fields(annotation), *chain.from_iterable(within)]
    return list(chain.from_iterable(_fields_within(each) for each in get_args(annotation)))
