"""OpenAI's messages, as requests hold them; and as vision datasets of Hugging Face do, with the media in
columns of their own that parts {"type": "image"} or marks in the texts take in order.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "a dog"}],
     "images": ["images/1.png"]}

An assistant's message with "weight": 0 is read and not learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from okavango.modalities.content import Fault, kind_of, unknown_keys
from okavango.training.formats.normal import (
    MEDIA_KEYS,
    MODALITIES,
    NOTHING,
    Draft,
    Normal,
    has_media,
    media_part,
    media_url,
    row_keys,
)

KEYS = ("messages", *MEDIA_KEYS, "id")
_MESSAGE_KEYS = ("role", "content", "weight")


def openai(row: Mapping[str, Any]) -> Normal:
    own = row_keys(row, KEYS)
    if "messages" not in row:
        return Normal(own=[*own, Fault("messages", "is missing")])
    messages = row["messages"]
    if not isinstance(messages, list):
        return Normal(messages, own=own)
    for i, message in enumerate(messages):
        if isinstance(message, Mapping):
            own += unknown_keys(message, _MESSAGE_KEYS, f"messages[{i}]")
    if not has_media(row) and not any(map(_has_short_parts, messages)):
        return Normal(messages, own=own)
    return _filled(row, own)


def _has_short_parts(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(map(_is_short, content))


def _is_short(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in MODALITIES


def _filled(row: Mapping[str, Any], own: list[Fault]) -> Normal:
    draft = Draft(row, "messages")
    draft.normal.own += own
    for i, message in enumerate(row["messages"]):
        if isinstance(message, Mapping) and "content" in message:
            content = _content(message["content"], f"messages[{i}].content", row, draft)
            message = {**message, "content": content}
        draft.normal.messages.append(message)
    draft.lead()
    return draft.done()


def _content(content: Any, name: str, row: Mapping[str, Any], draft: Draft) -> Any:
    if isinstance(content, str):
        return draft.split(content, name) if has_media(row) else content
    if not isinstance(content, list):
        return content
    return [_part(part, f"{name}[{i}]", draft) if _is_short(part) else part for i, part in enumerate(content)]


def _part(part: Mapping[str, Any], at: str, draft: Draft) -> dict[str, Any]:
    """A part {"type": "image"}: with the medium in it, or with the row's next one."""
    modality = part["type"]
    draft.normal.own += unknown_keys(part, ("type", modality), at)
    value = part.get(modality)
    if value is None:
        return draft.take(modality, at, f"is {modality}")
    place = f"{at}.{modality}"
    url = media_url(value, place)
    if url is None:
        text = f"must be a path or a data URL, not {kind_of(value)}"
        draft.normal.own.append(Fault(place, text))
        return NOTHING
    draft.normal.places[at] = place
    return media_part(modality, url)
