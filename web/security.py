"""Who may call: API keys, and without keys this machine alone.

Without keys the server listens on loopback only, and refuses what a web page elsewhere could make a browser
send there: a request under a foreign host name (DNS rebinding), or one of another origin. With keys, /v1
takes bearer tokens, and everything that a browser opens takes HTTP basic with a key as the password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from okavango.platform.errors import ConfigError
from okavango.web.problems import HttpError

LOCAL = "local"
API = "/v1/"
PROBES = frozenset({"/healthz", "/readyz"})
"""Open to all: load balancers have no keys, and these tell nothing but a state."""


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """Raises ConfigError where a server without keys would listen beyond this machine."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"without API keys the server listens on this machine only, not on {host or 'every address'}",
            where="--host",
            remedy="set OKAVANGO_API_KEYS to one or more keys, separated by commas",
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Keys:
    """Compares in constant time, and never holds a key itself."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    @property
    def principals(self) -> tuple[str, ...]:
        """A name for the holder of each key, fit for logs."""
        return tuple(map(_principal, self._digests))

    def principal(self, key: bytes) -> str | None:
        """The name of a key's holder; None for a key that is not known."""
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return _principal(digest) if any(matches) else None


def _principal(digest: bytes) -> str:
    return f"key-{digest.hex()[:8]}"


class Guard:
    """ASGI middleware: refuses callers that may not, and notes the others as scope["state"]["principal"]."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it, and no rule below covers it
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        if scope["type"] == "http":
            scope["state"]["principal"] = self._admit(scope["path"], Headers(scope=scope))
        await self.app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> str:
        if path in PROBES:
            return LOCAL
        if not self.keys:
            check_host(headers)
        # A bearer token cannot be sent by a page that does not have it; all else may be the browser's doing.
        if not headers.get("authorization", "").lower().startswith("bearer "):
            check_origin(headers)
        return self._authenticated(path, headers) if self.keys else LOCAL

    def _authenticated(self, path: str, headers: Headers) -> str:
        bearer = path.startswith(API)
        key = _bearer(headers) if bearer else (_basic(headers) or _bearer(headers))
        principal = self.keys.principal(key) if key is not None else None
        if principal is not None:
            return principal
        message = "this API key is not known" if key is not None else "an API key is needed"
        remedy = "send Authorization: Bearer KEY" if bearer else "sign in with a key as the password"
        scheme = "Bearer" if bearer else 'Basic realm="okavango", charset="UTF-8"'
        raise HttpError(401, "invalid_api_key", f"{message} ({remedy})", headers={"WWW-Authenticate": scheme})


def check_host(headers: Headers) -> None:
    """Raises HttpError where the caller knows this machine by a name that strangers can point at it."""
    host = _hostname(f"//{headers.get('host', '')}")
    if host is None or not is_loopback(host):
        raise HttpError(
            403,
            "forbidden_host",
            f"without API keys this server answers as localhost only, not as {host or 'a host without name'}",
        )


def check_origin(headers: Headers) -> None:
    """Raises HttpError where a page of another origin sent the request."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise HttpError(403, "forbidden_origin", f"pages of {origin} may not call this server")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _bearer(headers: Headers) -> bytes | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    # Starlette reads headers as Latin-1, which gives back the very bytes.
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" and key.strip() else None


def _basic(headers: Headers) -> bytes | None:
    """The password; the user's name is of no account."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None
