"""One request to an OpenAI-compatible server, timed as it arrives.

While requests run, pieces are only put aside with the time at which they came; they are read when the run is
over, so that the client takes as little as it can of the processors that it may share with the server.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from timing import Trace

_EVENT_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_ERROR = 200


@dataclass(frozen=True)
class Call:
    """A request, ready to be sent. `wanted`: tokens asked for."""

    model: str
    path: str
    body: bytes
    wanted: int


@dataclass(frozen=True)
class Reply:
    """What came: pieces of the body, each with its time. `failure`: the connection's, if it failed."""

    call: Call
    sent: float
    ended: float
    status: int
    is_stream: bool
    pieces: tuple[tuple[float, bytes], ...]
    failure: str | None = None

    def trace(self) -> Trace:
        """Read the reply."""
        try:
            if self.failure is not None:
                raise ReplyError(self.failure)
            if self.status != 200:
                raise ReplyError(f"{self.status} {error_text(self._whole)}")
            return self._streamed() if self.is_stream else self._at_once()
        except ReplyError as error:
            return Trace(self.call.model, self.sent, (), self.ended, 0, self.call.wanted, error=str(error))

    @property
    def text(self) -> str:
        """The answer's text.

        Raises:
            ReplyError: there is none.
        """
        if (error := self.trace().error) is not None:
            raise ReplyError(f"{self.call.model}: {error}")
        found = [event for _, event in events(self.pieces)] if self.is_stream else [parse(self._whole)]
        return "".join(text_of(choice) for event in found for choice in event.get("choices") or ())

    @property
    def _whole(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def _at_once(self) -> Trace:
        usage = parse(self._whole).get("usage") or {}
        if "completion_tokens" not in usage:
            raise ReplyError("the answer has no usage; ask for a stream, whose pieces can be counted")
        return self._trace((), usage)

    def _streamed(self) -> Trace:
        times: list[float] = []
        usage: dict[str, Any] = {}
        finished = False
        for when, event in events(self.pieces):
            if event.get("error"):
                raise ReplyError(error_text(json.dumps(event).encode()))
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finished = finished or choice.get("finish_reason") is not None
                times += [when] if text_of(choice) else []
        if not finished:
            raise ReplyError("the stream ended before the answer did")
        return self._trace(tuple(times), {"completion_tokens": len(times), **usage})

    def _trace(self, times: tuple[float, ...], usage: dict[str, Any]) -> Trace:
        return Trace(
            model=self.call.model,
            sent=self.sent,
            times=times,
            ended=self.ended,
            tokens=usage["completion_tokens"],
            wanted=self.call.wanted,
            prompt_tokens=usage.get("prompt_tokens") or 0,
        )


class ReplyError(Exception):
    """A reply that is no answer."""


class Client:
    """Connections to one server, as many as there are requests at once."""

    def __init__(self, url: str, key: str | None, seconds: float) -> None:
        # Compressed streams come late; a proxy from the environment would be measured, too.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=api_of(url), headers=headers, limits=limits, timeout=seconds, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, call: Call) -> Reply:
        """Send a request and put its reply aside; a broken connection is a reply, too."""
        pieces: list[tuple[float, bytes]] = []
        status, is_stream, failure = 0, False, None
        sent = time.perf_counter()
        try:
            async with self._http.stream("POST", call.path, content=call.body) as response:
                status = response.status_code
                is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
                pieces = [(time.perf_counter(), piece) async for piece in response.aiter_raw()]
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {error}".rstrip(": ")
        return Reply(call, sent, time.perf_counter(), status, is_stream, tuple(pieces), failure)


def api_of(url: str) -> str:
    """Where the API begins: /v1, unless the address names another path."""
    url = url.rstrip("/")
    return url if httpx.URL(url).path.strip("/") else f"{url}/v1"


def events(pieces: tuple[tuple[float, bytes], ...]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Server-sent events, each with the time of the piece that completed it, but for the closing [DONE]."""
    rest = b""
    for when, piece in pieces:
        *whole, rest = _EVENT_END.split(rest + piece)
        for event in whole:
            lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
            data = b"\n".join(lines)
            if data and data != b"[DONE]":
                yield when, parse(data)


def parse(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ReplyError(f"not JSON: {data[:_LONGEST_ERROR]!r}") from error
    if not isinstance(found, dict):
        raise ReplyError(f"not an object: {data[:_LONGEST_ERROR]!r}")
    return found


def text_of(choice: dict[str, Any]) -> str:
    """New text of a completion or a chat, or of a piece of one; reasoning counts."""
    delta = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def error_text(body: bytes) -> str:
    """The message of an error in OpenAI's form, or the beginning of whatever it is."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:_LONGEST_ERROR]
    except (ValueError, KeyError, TypeError):
        return body[:_LONGEST_ERROR].decode(errors="replace").strip()
