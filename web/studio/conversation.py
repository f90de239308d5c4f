"""A conversation as the studio keeps it: turns, from which the prompt and the page are made.

Knows nothing of Gradio. Media are paths of files that the browser uploaded.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from okavango.modalities.content import Limits, Message, Modality, parse_messages
from okavango.modalities.encoders import check_medium
from okavango.platform.errors import MediaError

SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".oga")


@dataclass(frozen=True)
class Provenance:
    """What made an answer, and at what cost.

    Attributes:
        model: adapter@version, or the base's name.
        prompt_tokens: None where the answer was stopped before it was whole.
        seconds: from the question to the last token.
        tokens_per_second: while tokens came; None where they were too few to tell.
        media: in the prompt; `cached` of them had their features in the cache (None: stopped too early to
            tell).
        ending: stop, length or stopped.
        notes: what the reader should know besides.
    """

    model: str
    digest: str
    prompt_tokens: int | None
    completion_tokens: int
    seconds: float
    tokens_per_second: float | None
    media: int = 0
    cached: int | None = None
    ending: str = "stop"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A question and what came of it. A turn with a `fault` is shown, but is no part of what comes after."""

    question: str
    media: tuple[str, ...] = ()
    answer: str = ""
    made_by: Provenance | None = None
    fault: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.made_by is not None and self.fault is None and bool(self.answer)


Conversation = tuple[Turn, ...]


def completed(turns: Conversation) -> Conversation:
    """The turns that later questions build on."""
    return tuple(turn for turn in turns if turn.is_complete)


def messages_of(turns: Sequence[Turn], limits: Limits) -> tuple[Message, ...]:
    """What the turns mean to a model, every medium decoded once. Takes CPU time: never on the event loop.

    Raises:
        MediaError: a picture or sound is not accepted.
        PromptError: the conversation is over a limit.
    """

    def load(path: str, modality: Modality) -> bytes:
        return _read(Path(path), modality, limits)

    return parse_messages([message for turn in turns for message in _raw(turn)], load, limits)


def _raw(turn: Turn) -> list[dict[str, Any]]:
    """The turn in OpenAI's form, with paths in place of URLs."""
    parts: list[dict[str, Any]] = [_part(path) for path in turn.media]
    if turn.question:
        parts.append({"type": "text", "text": turn.question})
    asked = {"role": "user", "content": parts}
    return [asked, {"role": "assistant", "content": turn.answer}] if turn.answer else [asked]


def _part(path: str) -> dict[str, Any]:
    if modality_of(path) == "audio":
        return {"type": "input_audio", "input_audio": {"data": path}}
    return {"type": "image_url", "image_url": {"url": path}}


def modality_of(path: str) -> Modality:
    """What a file is to be read as, by its name; what is no sound is read as a picture."""
    kind = mimetypes.guess_type(path)[0] or ""
    return "audio" if kind.startswith("audio/") or path.endswith(SOUNDS) else "image"


def _read(path: Path, modality: Modality, limits: Limits) -> bytes:
    try:
        data = path.read_bytes()  # the upload was bounded already
    except OSError as error:
        raise MediaError("the file is no longer on the server", remedy="add it again") from error
    check_medium(data, modality, limits)
    return data
