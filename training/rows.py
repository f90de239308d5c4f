"""A line of a JSONL dataset → a conversation, and every fault in it.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "images/1.png"}},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "dog face"}]}

The messages are parsed as a request's are (modalities.content). On top of that a row must be something to
learn from: it ends with an assistant's turn, says something there, and holds nothing that would be ignored.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from okavango.modalities.content import Fault, Limits, LoadMedia, Message, read_messages, unknown_keys

_ROW_KEYS = ("messages",)
_MESSAGE_KEYS = ("role", "content")
_BOM = b"\xef\xbb\xbf"


def read_row(
    line: bytes, load_media: LoadMedia, limits: Limits | None = None
) -> tuple[tuple[Message, ...], list[Fault]]:
    """One line, without its end → its messages, and every fault found. With faults, the messages are those
    that could be read."""
    limits = limits or Limits()
    if len(line) > row_bytes(limits):
        return (), [Fault("", f"the line is longer than {row_bytes(limits):,} bytes")]
    try:
        raw = _parse(line)
    except ValueError as error:
        return (), [Fault("", str(error))]
    if not isinstance(raw, dict):
        return (), [Fault("", "the row is not a JSON object")]
    faults = list(unknown_keys(raw, _ROW_KEYS, ""))
    if "messages" not in raw:
        return (), [*faults, Fault("messages", "is missing")]
    messages, found = read_messages(raw["messages"], load_media, limits)
    faults += found
    if isinstance(raw["messages"], list):
        faults += _conversation_faults(raw["messages"], found)
    return messages, faults


def row_bytes(limits: Limits) -> int:
    """The longest line that could hold what `limits` allows: media in base64, every character escaped."""
    return limits.media_per_request * (limits.media_bytes * 4 // 3 + 4) + 12 * limits.text_chars + 65_536


def read_line(file: BinaryIO, limits: Limits) -> bytes:
    """The next line with its end, or b"" at the file's end. Of a line that is too long, just so much that
    read_row says so; the file then stands behind it."""
    line = piece = file.readline(row_bytes(limits) + 3)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(1 << 20)
    return line


def _parse(line: bytes) -> Any:
    """Raises ValueError with what is wrong, for the reader."""
    if line.startswith(_BOM):
        raise ValueError("starts with a byte order mark; save the file as UTF-8 without one")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(f"is not UTF-8: byte 0x{byte:02x} at position {error.start + 1}") from error
    if not text.strip():
        raise ValueError("the line is blank")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of equal keys in silence; we do not."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {reprlib.repr(key)} stands twice in one object")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"is not JSON: {name} is no JSON value")


def _conversation_faults(raw: list[Any], found: list[Fault]) -> Iterator[Fault]:
    faulty = {fault.field.split(".")[0] for fault in found}
    roles = [item.get("role") if isinstance(item, dict) else None for item in raw]
    for i, (item, role) in enumerate(zip(raw, roles, strict=True)):
        place = f"messages[{i}]"
        if isinstance(item, dict):
            yield from unknown_keys(item, _MESSAGE_KEYS, place)
        if role == "system" and i > 0:
            yield Fault(f"{place}.role", "a system message comes first, and there is one at most")
        if role == "assistant" and place not in faulty and not _text_of(item["content"]).strip():
            yield Fault(f"{place}.content", "the assistant's text is empty")
    if raw and "assistant" not in roles:
        yield Fault("messages", "has no assistant turn, so there is nothing to learn")
    elif raw and roles[-1] in ("system", "user"):
        yield Fault(f"messages[{len(raw) - 1}].role", "the last message must be the assistant's")


def _text_of(content: Any) -> str:
    """The text of a message's content that was found to be faultless."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
