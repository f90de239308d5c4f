"""A row of a dataset → a conversation, and every fault in it.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "images/1.png"}},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "dog face"}]}

Whatever its format (training.formats), a row becomes OpenAI's messages first, and those are parsed as a
request's are (modalities.content). On top of that a row must be something to learn from: it ends with an
assistant's turn, says something there, and holds nothing that would be ignored.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from okavango.modalities.content import Fault, Limits, LoadMedia, Message, is_name, read_messages
from okavango.training.formats.detect import Format, formats_of
from okavango.training.formats.normal import Normal
from okavango.training.sources.source import Raw

_BOM = b"\xef\xbb\xbf"
_PART_URLS = {"image_url": "url", "input_audio": "data"}


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one format.

    Attributes:
        unused: columns of a table that no row's format has; they were reported once for all rows.
        named: whether the user named the format; if not, the first rows told.
    """

    form: Format
    load_media: LoadMedia
    limits: Limits
    unused: frozenset[str] = frozenset()
    named: bool = False

    def read(self, raw: Raw) -> tuple[tuple[Message, ...], list[Fault]]:
        """A row's messages, and every fault found. With faults, the messages are those that could be read."""
        if raw.fault is not None:
            return (), [Fault("", raw.fault)]
        if not isinstance(raw.value, dict):
            return (), [Fault("", "the row is not a JSON object")]
        fitting = formats_of(raw.value)
        if fitting and self.form.name not in fitting:
            return (), [Fault("", self._other(fitting))]
        normal = self.form.normalise(self._used(raw.value))
        if normal.messages is None and normal.own:
            return (), normal.own
        return self._parse(normal)

    def names(self, raw: Raw) -> list[str]:
        """Of a faultless row: its media's names, without folders, of those that have one."""
        messages = self.form.normalise(self._used(raw.value)).messages
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        urls = [part[part["type"]][_PART_URLS[part["type"]]] for part in parts if part["type"] in _PART_URLS]
        return [url.rpartition("/")[2].removeprefix("embedded:") for url in urls if is_name(url)]

    def _used(self, row: dict[str, Any]) -> Mapping[str, Any]:
        return {key: row[key] for key in row if key not in self.unused} if self.unused else row

    def _parse(self, normal: Normal) -> tuple[tuple[Message, ...], list[Fault]]:
        messages, found = read_messages(normal.messages, self.load_media, self.limits)
        known = {fault.field for fault in normal.faults}
        faults = normal.faults + [fault for fault in found if fault.field not in known]
        if isinstance(normal.messages, list):
            faults += _conversation_faults(normal.messages, faults)
            faults += _weight_faults(normal.messages)
        if not faults:
            messages = tuple(map(_weighed, messages, normal.messages))
        placed = [replace(fault, field=normal.place(fault.field)) for fault in faults]
        return messages, normal.own + placed

    def _other(self, fitting: frozenset[str]) -> str:
        why = "as was asked for" if self.named else "by its first rows"
        return (
            f"is written as {' or '.join(sorted(fitting))}, and the data are read as {self.form.name} {why}; "
            "one format a file, or name it: --format"
        )


def row_bytes(limits: Limits) -> int:
    """The longest row that could hold what `limits` allows: media in base64, every character escaped."""
    return limits.media_per_request * (limits.media_bytes * 4 // 3 + 4) + 12 * limits.text_chars + 65_536


def parse_row(data: bytes, limits: Limits, unit: str = "line") -> Raw:
    """A row's JSON, or what is wrong with it. `unit`: what the data are in their file, for the reader."""
    if len(data) > row_bytes(limits):
        return Raw(None, f"the {unit} is longer than {row_bytes(limits):,} bytes")
    try:
        return Raw(_parse(data, unit))
    except ValueError as error:
        return Raw(None, str(error))


def _parse(data: bytes, unit: str) -> Any:
    """Raises ValueError with what is wrong, for the reader."""
    if data.startswith(_BOM):
        raise ValueError("starts with a byte order mark; save the file as UTF-8 without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"is not UTF-8: byte 0x{byte:02x} at position {error.start + 1}") from error
    if not text.strip():
        raise ValueError(f"the {unit} is blank")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        below = f" of its line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}{below}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of equal keys in silence; we do not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"is not JSON: {name} is no JSON value")


def _conversation_faults(raw: list[Any], found: list[Fault]) -> Iterator[Fault]:
    faulty = {fault.field.split(".")[0] for fault in found}
    knows_roles = not any(fault.field.endswith(".role") for fault in found)
    roles = [item.get("role") if isinstance(item, dict) else None for item in raw]
    for i, (item, role) in enumerate(zip(raw, roles, strict=True)):
        place = f"messages[{i}]"
        if role == "system" and i > 0:
            yield Fault(f"{place}.role", "a system message comes first, and there is one at most")
        if role == "assistant" and place not in faulty and not _text_of(item["content"]).strip():
            yield Fault(f"{place}.content", "the assistant's text is empty")
    if raw and "assistant" not in roles:
        if knows_roles:
            yield Fault("messages", "has no assistant turn, so there is nothing to learn")
    elif raw and roles[-1] in ("system", "user"):
        yield Fault(f"messages[{len(raw) - 1}].role", "the last message must be the assistant's")


def _weight_faults(raw: list[Any]) -> Iterator[Fault]:
    """Of OpenAI's `weight`: 0 for an assistant's message that is not learned."""
    weights = []
    for i, item in enumerate(raw):
        weight = item.get("weight") if isinstance(item, dict) else None
        if isinstance(item, dict) and item.get("role") == "assistant":
            weights.append(weight)
        if weight is None:
            continue
        if isinstance(weight, bool) or weight not in (0, 1):
            yield Fault(f"messages[{i}].weight", "must be 0 or 1")
        elif item.get("role") != "assistant":
            yield Fault(f"messages[{i}].weight", "only an assistant's message is learned, or not")
    if weights and all(weight == 0 and weight is not False for weight in weights):
        yield Fault("messages", "all of the assistant's messages have weight 0, so there is nothing to learn")


def _weighed(message: Message, raw: Any) -> Message:
    return replace(message, is_learned=raw.get("weight") != 0)


def _text_of(content: Any) -> str:
    """The text of a message's content that was found to be faultless."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
