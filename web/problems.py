"""Errors → answers of OpenAI's shape: {"error": {"message", "type", "param", "code"}}. The table of statuses.

Knows nothing of routes. What is the caller's fault is told whole; of what is the server's fault only what
the caller can act on, and the log has the rest.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from okavango.platform.errors import (
    BusyError,
    ConflictError,
    DeadlineError,
    DownloadError,
    InputError,
    IntegrityError,
    NotFoundError,
    NotReadyError,
    OkavangoError,
)

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
LIMITED = "rate_limit_error"
SERVER = "server_error"

# The first class that an error is an instance of decides.
STATUSES: tuple[tuple[type[OkavangoError], int, str], ...] = (
    (BusyError, 429, LIMITED),
    (InputError, 400, INVALID),
    (NotFoundError, 404, INVALID),
    (ConflictError, 409, INVALID),
    (DeadlineError, 504, SERVER),
    (NotReadyError, 503, SERVER),
    (DownloadError, 503, SERVER),
    (IntegrityError, 500, SERVER),
    (OkavangoError, 500, SERVER),
)
RETRY_SECONDS = 2
_FIELD = re.compile(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """An error as the caller gets it. `param` is the field of the request that it is about."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers))


class HttpError(OkavangoError):
    """A refusal that only HTTP knows: no key, a body too large, a content type of another kind."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def problem_of(error: BaseException, request_id: str) -> Problem:
    """What the caller is told of an error."""
    match error:
        case HttpError():
            return Problem(error.status, INVALID, str(error), error.code, headers=error.headers)
        case OkavangoError():
            return _known(error)
        case HTTPException():
            return _http(error)
    message = f"the server failed; its log tells why under request {request_id}"
    return Problem(500, SERVER, message, "internal_error")


def install(app: FastAPI) -> None:
    """Answer every error that a route raises, or that finds no route. The rest is web.edge's."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error, request.state.request_id)
        if problem.status == 500:
            log.error("%s failed", request.state.request_id, exc_info=error)
        elif problem.status > 500:
            log.warning("%s failed: %s", request.state.request_id, error)
        return problem.response()

    for kind in (OkavangoError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, _validation)


def _known(error: OkavangoError) -> Problem:
    status, kind = next((status, kind) for cls, status, kind in STATUSES if isinstance(error, cls))
    place = error.where if error.where and _FIELD.fullmatch(error.where) else None
    return Problem(status, kind, _text(error, status), error.code, place, _headers(error))


def _text(error: OkavangoError, status: int) -> str:
    """Where the server is at fault, place and remedy are its operator's, who finds them in the log."""
    return str(error) if status < 500 else error.message


def _headers(error: OkavangoError) -> dict[str, str]:
    match error:
        case BusyError():
            return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        case NotReadyError() | DownloadError():
            return {"Retry-After": str(RETRY_SECONDS)}
        case ConflictError() | DeadlineError():
            # OpenAI's clients try these again by themselves: a state that will not change by that, and a
            # question whose time is over.
            return {"x-should-retry": "false"}
    return {}


def _http(error: HTTPException) -> Problem:
    """What the framework itself refuses: no such route, or another method."""
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    phrase = HTTPStatus(error.status_code).phrase
    message = str(error.detail or phrase)
    code = codes.get(error.status_code, phrase.lower().replace(" ", "_"))
    kind = INVALID if error.status_code < 500 else SERVER
    return Problem(error.status_code, kind, message, code, headers=error.headers or {})


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """A query or path parameter of the wrong kind; bodies are read by web.api.body."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    return Problem(400, INVALID, f"{name}: {fault['msg']}", InputError.code, name).response()
