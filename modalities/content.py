"""What a conversation is made of, and the one parser that reads it from OpenAI's messages.

The same parser serves requests (the first fault is the answer) and data files (every fault is reported).
It knows neither where media files lie nor how they are decoded: it is given a `load_media`.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from okavango.platform.errors import MediaError, PromptError

Modality = Literal["image", "audio"]
ROLES = ("system", "user", "assistant")
# `detail` asks for a resolution; a picture takes a fixed number of tokens here, so it changes nothing.
_PART_KEYS = {
    "text": ("type", "text"),
    "image_url": ("type", "image_url"),
    "input_audio": ("type", "input_audio"),
}
_IMAGE_KEYS = ("url", "detail")
_DETAILS = ("auto", "low", "high", "original")
_AUDIO_KEYS = ("data", "format")
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*", re.ASCII)
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?,", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """What is accepted. Sizes in bytes, pixels, seconds and counts."""

    media_bytes: int = 20 * 1024 * 1024
    image_pixels: int = 40_000_000
    audio_seconds: float = 600.0
    media_per_request: int = 8
    text_chars: int = 1_000_000


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Media:
    """An encoded picture or sound as it was sent. Identity is its content."""

    modality: Modality
    data: bytes

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


Part = Text | Media


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: its parts in the order in which they were sent.

    `is_learned`: whether training learns to say it, if it is the assistant's.
    """

    role: str
    parts: tuple[Part, ...]
    is_learned: bool = True

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for part in self.parts if isinstance(part, Media))


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a conversation. `field` is a path such as messages[1].content[0].image_url.url.

    `is_media`: whether it is a medium itself that is not accepted.
    """

    field: str
    text: str
    is_media: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


LoadMedia = Callable[[str, Modality], bytes]
"""(url, modality) → bytes. Raises MediaError."""


def read_messages(
    raw: Any, load_media: LoadMedia, limits: Limits | None = None
) -> tuple[tuple[Message, ...], list[Fault]]:
    """OpenAI's `messages` → messages, and every fault found on the way."""
    limits = limits or Limits()
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        return (), [Fault("messages", f"must be a list, not {kind_of(raw)}")]
    if not raw:
        return (), [Fault("messages", "is empty")]
    faults: list[Fault] = []
    messages = tuple(
        message
        for i, item in enumerate(raw)
        if (message := _message(item, f"messages[{i}]", load_media, faults)) is not None
    )
    faults.extend(_over_limits(messages, limits))
    return messages, faults


def parse_messages(raw: Any, load_media: LoadMedia, limits: Limits | None = None) -> tuple[Message, ...]:
    """As read_messages, for one request.

    Raises:
        PromptError, MediaError: with the first fault.
    """
    messages, faults = read_messages(raw, load_media, limits)
    if faults:
        kind = MediaError if faults[0].is_media else PromptError
        raise kind(faults[0].text, where=faults[0].field)
    return messages


def unknown_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[Fault]:
    """A fault for each key that nobody would read. Clients write keys that they leave unset as null."""
    for key, value in raw.items():
        if key in known or value is None:
            continue
        shown = key if key.isidentifier() and len(key) <= 40 else reprlib.repr(key)
        close = difflib.get_close_matches(key[:40], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        yield Fault(f"{where}.{shown}" if where else shown, f"unknown key; {hint}")


def data_url_bytes(url: str, modality: Modality) -> bytes:
    """The bytes of a data URL (RFC 2397).

    Raises:
        MediaError: not a data URL, of another type, or not base64.
    """
    match = _DATA_URL.match(url)
    if match is None:
        scheme = url.split(":", 1)[0] if ":" in url[:16] else "a path"
        raise MediaError(
            f"only data URLs are accepted, not {scheme}", remedy=f"send data:{modality}/…;base64,…"
        )
    mime, _, is_base64 = match.groups()
    if not mime.startswith(f"{modality}/"):
        raise MediaError(f"content type {mime} where {modality}/… is expected")
    if not is_base64:
        raise MediaError("the data URL is not base64")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise MediaError(f"the data URL is not valid base64: {error}") from error


def is_name(url: str) -> bool:
    """Whether a medium is named rather than sent: neither a data URL nor bare base64, which has no full stop
    and no colon."""
    return not url.startswith("data:") and not _BASE64.fullmatch(url)


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _message(raw: Any, where: str, load_media: LoadMedia, faults: list[Fault]) -> Message | None:
    if not isinstance(raw, Mapping):
        faults.append(Fault(where, f"must be an object, not {kind_of(raw)}"))
        return None
    role = raw.get("role")
    if "role" not in raw:
        faults.append(Fault(f"{where}.role", "is missing"))
    elif role not in ROLES:
        faults.append(
            Fault(f"{where}.role", f"is {reprlib.repr(role)}; one of {', '.join(ROLES)} is expected")
        )
    if "content" not in raw:
        faults.append(Fault(f"{where}.content", "is missing"))
        return None
    parts = tuple(_parts(raw["content"], f"{where}.content", load_media, faults))
    if role != "user" and any(isinstance(part, Media) for part in parts):
        faults.append(Fault(f"{where}.content", f"a {role} message holds no media"))
    return Message(str(role), parts)


def _parts(raw: Any, where: str, load_media: LoadMedia, faults: list[Fault]) -> Iterator[Part]:
    if isinstance(raw, str):
        yield _text(raw, where, faults)
        return
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        faults.append(Fault(where, f"must be a string or a list of parts, not {kind_of(raw)}"))
        return
    if not raw:
        faults.append(Fault(where, "is empty"))
    for i, item in enumerate(raw):
        part = _part(item, f"{where}[{i}]", load_media, faults)
        if part is not None:
            yield part


def _part(raw: Any, where: str, load_media: LoadMedia, faults: list[Fault]) -> Part | None:
    if not isinstance(raw, Mapping):
        faults.append(Fault(where, f"must be an object, not {kind_of(raw)}"))
        return None
    kind = raw.get("type")
    if isinstance(kind, str) and kind in _PART_KEYS:
        faults += unknown_keys(raw, _PART_KEYS[kind], where)
    match kind:
        case "text":
            if isinstance(raw.get("text"), str):
                return _text(raw["text"], f"{where}.text", faults)
            faults.append(Fault(f"{where}.text", "is missing or not a string"))
        case "image_url":
            return _image(raw.get("image_url"), f"{where}.image_url", load_media, faults)
        case "input_audio":
            return _audio(raw.get("input_audio"), f"{where}.input_audio", load_media, faults)
        case None:
            faults.append(Fault(f"{where}.type", "is missing"))
        case other:
            shown = reprlib.repr(other)
            known = ", ".join(_PART_KEYS)
            faults.append(Fault(f"{where}.type", f"is {shown}; one of {known} is expected"))
    return None


def _text(raw: str, where: str, faults: list[Fault]) -> Text:
    try:
        raw.encode()
    except UnicodeEncodeError as error:  # JSON can spell one half of a surrogate pair; no tokenizer takes it
        faults.append(Fault(where, f"holds half a surrogate pair at character {error.start + 1}"))
    return Text(raw)


def _image(raw: Any, where: str, load_media: LoadMedia, faults: list[Fault]) -> Media | None:
    url = raw.get("url") if isinstance(raw, Mapping) else None
    if not isinstance(url, str):
        faults.append(Fault(f"{where}.url", "is missing or not a string"))
        return None
    faults += unknown_keys(raw, _IMAGE_KEYS, where)
    if raw.get("detail") not in (None, *_DETAILS):
        shown = reprlib.repr(raw["detail"])
        faults.append(Fault(f"{where}.detail", f"is {shown}; one of {', '.join(_DETAILS)} is expected"))
    return _media(url, "image", f"{where}.url", load_media, faults)


def _audio(raw: Any, where: str, load_media: LoadMedia, faults: list[Fault]) -> Media | None:
    """OpenAI's `input_audio`: base64 as it is, or whatever a picture's URL may be."""
    data = raw.get("data") if isinstance(raw, Mapping) else None
    if not isinstance(data, str):
        faults.append(Fault(f"{where}.data", "is missing or not a string"))
        return None
    faults += unknown_keys(raw, _AUDIO_KEYS, where)
    form = raw.get("format")
    if form is not None and form not in AUDIO_FORMATS:
        known = ", ".join(AUDIO_FORMATS)
        faults.append(Fault(f"{where}.format", f"is {reprlib.repr(form)}; one of {known} is expected"))
        return None
    is_bare = not is_name(data) and not data.startswith("data:")
    url = f"data:audio/{form or 'wav'};base64,{data}" if is_bare else data
    return _media(url, "audio", f"{where}.data", load_media, faults)


def _media(
    url: str, modality: Modality, where: str, load_media: LoadMedia, faults: list[Fault]
) -> Media | None:
    try:
        return Media(modality, load_media(url, modality))
    except MediaError as error:
        faults.append(Fault(where, str(error), is_media=True))
        return None


def _over_limits(messages: tuple[Message, ...], limits: Limits) -> Iterator[Fault]:
    count = sum(len(message.media) for message in messages)
    if count > limits.media_per_request:
        yield Fault("messages", f"{count} media, over the limit of {limits.media_per_request}", is_media=True)
    chars = sum(len(message.text) for message in messages)
    if chars > limits.text_chars:
        yield Fault("messages", f"{chars:,} characters, over the limit of {limits.text_chars:,}")
