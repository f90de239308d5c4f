"""The outermost layer: a call's id, the gate, errors that nobody below answered, a line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from okavango.platform.errors import NotReadyError, OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.web.draining import Gate
from okavango.web.problems import problem_of
from okavango.web.security import API

log = logging.getLogger("okavango.web")

GONE = 499
"""In the log only: the client left before it had its answer."""
WATCHED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Answered until the very end: what looks at a server wants to see it draining."""


COUNTED = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose requests are counted. What gets past the door is counted where it ends."""


class Edge:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, gate: Gate, metrics: Metrics) -> None:
        self.app = app
        self.gate = gate
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = _Call(scope, send)
        try:
            await self._admit(scope, receive, call.send)
        except ClientDisconnect:
            call.status = GONE
        except asyncio.CancelledError:
            if not self.gate.draining:
                raise
            await call.close()
        except Exception as error:
            self._count(scope["path"], error)
            await call.fail(error)
        finally:
            call.note()

    def _count(self, path: str, error: Exception) -> None:
        """What the gate or the guard refused: routes answer their own errors, and none of them comes here."""
        if path in COUNTED and isinstance(error, OkavangoError):
            self.metrics.count("okavango_requests_total", model="none", status=error.code)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith(API):
            with self.gate.pass_through():
                await self.app(scope, receive, send)
            return
        if path not in WATCHED:
            self.gate.check()
        await self.app(scope, receive, send)


class _Call:
    """One call on its way out."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = f"req_{uuid.uuid4().hex}"
        self.status: int | None = None
        self._ended = False
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        scope.setdefault("state", {})["request_id"] = self.id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        """Answer an error, unless part of an answer is out already: then the connection just ends."""
        problem = problem_of(error, self.id)
        if problem.status >= 500 and not isinstance(error, OkavangoError):
            log.error("%s failed", self.id, exc_info=error)
        if self.status is None:
            await problem.response()(self._scope, _no_body, self.send)

    async def close(self) -> None:
        """End an answer that has no end of its own, now that the server has one."""
        if self.status is None:
            await self.fail(NotReadyError("the server is shutting down"))
        elif not self._ended:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def note(self) -> None:
        scope = self._scope
        level = logging.INFO if scope["path"].startswith(API) else logging.DEBUG
        principal = scope["state"].get("principal", "-")
        took = time.monotonic() - self._began
        log.log(
            level,
            "%s %s %s → %s in %.3f s for %s",
            self.id,
            scope["method"],
            scope["path"],
            self.status,
            took,
            principal,
        )


async def _no_body() -> Message:
    return {"type": "http.disconnect"}
