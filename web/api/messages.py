"""A request's messages: parsed as data files' are, and their keys held to what is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from okavango.modalities.content import (
    Fault,
    Limits,
    Message,
    Modality,
    data_url_bytes,
    parse_messages,
    unknown_keys,
)
from okavango.modalities.encoders import check_medium
from okavango.platform.errors import MediaError, PromptError, UnsupportedError

# `name` tells speakers apart where a model is trained for it; no chat template here shows it.
_KEYS = ("role", "content", "name")
# Of OpenAI's answers, which clients send back as they came; nothing is in them here, and nothing may be.
_EMPTY_KEYS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id", "reasoning")


def read_request_messages(raw: Sequence[Any], limits: Limits) -> tuple[Message, ...]:
    """OpenAI's `messages`, every medium decoded once and found good. Takes CPU time.

    Raises:
        PromptError, MediaError, UnsupportedError: the first fault, with its path.
    """
    for i, item in enumerate(raw):
        if isinstance(item, Mapping):
            _check_keys(item, f"messages[{i}]")
    return parse_messages(raw, _MediaLoader(limits).load, limits)


def _check_keys(message: Mapping[str, Any], where: str) -> None:
    for key in _EMPTY_KEYS:
        if message.get(key):
            raise UnsupportedError("is not supported", where=f"{where}.{key}", remedy="leave it out")
    for fault in _key_faults(message, where):
        raise PromptError(fault.text, where=fault.field)


def _key_faults(message: Mapping[str, Any], where: str) -> Iterator[Fault]:
    read = {key: value for key, value in message.items() if key not in _EMPTY_KEYS}
    yield from unknown_keys(read, _KEYS, where)
    if not isinstance(message.get("name", ""), str | None):
        yield Fault(f"{where}.name", "must be a string")


class _MediaLoader:
    """Data URLs → bytes that decode. Refuses one medium too many before it is decoded."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = 0

    def load(self, url: str, modality: Modality) -> bytes:
        self._count += 1
        if self._count > self._limits.media_per_request:
            raise MediaError(f"over the limit of {self._limits.media_per_request} media a request")
        data = data_url_bytes(url, modality)
        check_medium(data, modality, self._limits)
        return data
