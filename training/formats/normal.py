"""A row in any format → OpenAI's messages, and where in the row each of their fields stands.

A format only says where things are: what a conversation must be like is told by one parser for all
(modalities.content, training.rows), in terms of OpenAI's messages; `Normal.place` turns its fields back into
those of the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from okavango.modalities.content import Fault, Modality, kind_of, unknown_keys

MEDIA_KEYS: Mapping[str, Modality] = {
    "image": "image",
    "images": "image",
    "audio": "audio",
    "audios": "audio",
}
"""A row's own keys for media, which marks in its texts take in order."""
MODALITIES: tuple[Modality, ...] = get_args(Modality)
NOTHING: dict[str, Any] = {"type": "text", "text": ""}
"""What stands where a medium should, once its fault is told."""
_MARK = re.compile(rf"\n?<({'|'.join(MODALITIES)})>\n?")
_LAST = re.compile(r"[.\[][^.\[]*\Z")


class Embedded(str):
    """The name of a medium that came with its row, as tables hold them: `data` is its bytes."""

    data: bytes

    @classmethod
    def of(cls, name: str, data: bytes) -> Embedded:
        # with a colon, it is a name and no base64 (content.is_name)
        found = cls(f"embedded:{name}")
        found.data = data
        return found


@dataclass
class Normal:
    """A row that was brought into OpenAI's form.

    Attributes:
        messages: OpenAI's; None if the row has no conversation at all.
        places: fields of `messages` → the row's own; what is not here stands in its nearest ancestor, and
            under its own name if it has none.
        faults: found on the way, in terms of `messages`.
        own: found on the way, in the row's terms.
    """

    messages: Any = None
    places: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    own: list[Fault] = field(default_factory=list)

    def place(self, name: str) -> str:
        """The row's own field for one of `messages`."""
        at = name
        while at not in self.places:
            shorter = _LAST.sub("", at)
            if shorter == at:
                return name
            at = shorter
        return self.places[at]


@dataclass
class _Held:
    """A medium of the row: `url` is None if it is none. `field`: where it stands."""

    modality: Modality
    url: str | None
    field: str


class Draft:
    """A conversation while it is put together, turn by turn.

    Args:
        row: the row, whose media its texts' marks take.
        key: the row's key that holds the conversation.
    """

    def __init__(self, row: Mapping[str, Any], key: str) -> None:
        # OpenAI's own fields stand where they are
        self.normal = Normal([], {} if key == "messages" else {"messages": key})
        self._held = list(_held_media(row, self.normal.own))
        self._marked = False

    def say(self, role: Any, text: Any, *, at: str, role_at: str, text_at: str) -> None:
        """Add a turn; `at`, `role_at`, `text_at` are where it, its role and its text stand."""
        turn = f"messages[{len(self.normal.messages)}]"
        self.normal.places |= {turn: at, f"{turn}.role": role_at, f"{turn}.content": text_at}
        if not isinstance(text, str):
            self.fault(f"{turn}.content", f"must be a string, not {kind_of(text)}")
            content: Any = ""
        else:
            content = self.split(text, f"{turn}.content")
        self.normal.messages.append({"role": role, "content": content})

    def fault(self, name: str, text: str) -> None:
        """A fault in terms of the messages."""
        self.normal.faults.append(Fault(name, text))

    def split(self, text: str, name: str) -> str | list[dict[str, Any]]:
        """A text's parts, with media for its marks; the text itself if it has none. A line's end beside a
        mark goes with it."""
        pieces = _MARK.split(text)
        if len(pieces) == 1:
            return text
        self.normal.places.setdefault(name, name)
        parts: list[dict[str, Any]] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(self.take(piece, f"{name}[{len(parts)}]", f"has an <{piece}> mark"))
            elif piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def take(self, modality: str, name: str, what: str) -> dict[str, Any]:
        """The row's next medium of a modality as a part; an empty text with a fault."""
        self._marked = True
        found = next((held for held in self._held if held.modality == modality), None)
        if found is None:
            self.fault(name, f"{what}, but the row holds no {modality} for it: add it, or take that out")
            return NOTHING
        self._held.remove(found)
        return self._part(found, name)

    def lead(self) -> None:
        """Put the media before the first user's text, in a row without any mark."""
        first = next((i for i, each in enumerate(self.normal.messages) if _says(each, "user")), None)
        if first is None or self._marked or not self._held:
            return
        held, self._held = self._held, []
        text, name = self.normal.messages[first]["content"], f"messages[{first}].content"
        self.normal.places.setdefault(name, name)
        parts = [self._part(each, f"{name}[{i}]") for i, each in enumerate(held)]
        tail = [{"type": "text", "text": text}] if text else []
        self.normal.messages[first]["content"] = [*parts, *tail]

    def done(self) -> Normal:
        """The result, with a fault for each medium that nothing took."""
        for held in self._held:
            text = f"is taken by no <{held.modality}> mark; put one where it belongs"
            self.normal.own.append(Fault(held.field, text))
        return self.normal

    def _part(self, held: _Held, name: str) -> dict[str, Any]:
        if held.url is None:
            return NOTHING
        self.normal.places[name] = held.field
        return media_part(held.modality, held.url)


def media_part(modality: str, url: str) -> dict[str, Any]:
    """A medium as a part of OpenAI's content."""
    if modality == "image":
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "input_audio", "input_audio": {"data": url}}


def media_url(value: Any, name: str) -> str | None:
    """A medium's path or data URL, or its name if the bytes are there; None for what is no medium.

    Tables hold a medium as bytes, or as Hugging Face's {"bytes": …, "path": …}.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return Embedded.of(name, value)
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return Embedded.of(path or name, data)
        return path if isinstance(path, str) else None
    return None


def _says(message: Any, role: str) -> bool:
    """Whether a message is a role's plain text."""
    is_its = isinstance(message, Mapping) and message.get("role") == role
    return is_its and isinstance(message.get("content"), str)


def has_media(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for key in MEDIA_KEYS)


def row_keys(row: Mapping[str, Any], known: tuple[str, ...]) -> list[Fault]:
    """A fault for each key of a row that nobody would read."""
    return list(unknown_keys(row, known, ""))


def _held_media(row: Mapping[str, Any], faults: list[Fault]) -> Iterator[_Held]:
    for key, modality in MEDIA_KEYS.items():
        value = row.get(key)
        if value is None:
            continue
        many = isinstance(value, list)
        for i, each in enumerate(value if many else [value]):
            name = f"{key}[{i}]" if many else key
            url = media_url(each, name)
            if url is None:
                faults.append(Fault(name, f"must be a path or a data URL, not {kind_of(each)}"))
            yield _Held(modality, url, name)
