"""A conversation as the studio keeps it: turns, from which the prompt and the page are made.

Knows nothing of Gradio. Pictures are paths of files that the browser uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from okavango.modalities.content import Limits, Message, Modality, parse_messages
from okavango.modalities.image import decode_image
from okavango.platform.errors import MediaError


@dataclass(frozen=True)
class Provenance:
    """What made an answer, and at what cost.

    Attributes:
        model: adapter@version, or the base's name.
        prompt_tokens: None where the answer was stopped before it was whole.
        seconds: from the question to the last token.
        tokens_per_second: while tokens came; None where they were too few to tell.
        pictures: in the prompt; `cached` of them had their features in the cache (None: stopped too early to
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
    pictures: int = 0
    cached: int | None = None
    ending: str = "stop"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A question and what came of it. A turn with a `fault` is shown, but is no part of what comes after."""

    question: str
    pictures: tuple[str, ...] = ()
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
    """What the turns mean to a model, every picture decoded once. Takes CPU time: never on the event loop.

    Raises:
        MediaError: a picture is not accepted.
        PromptError: the conversation is over a limit.
    """

    def load(path: str, modality: Modality) -> bytes:
        return _read_picture(Path(path), limits)

    return parse_messages([message for turn in turns for message in _raw(turn)], load, limits)


def _raw(turn: Turn) -> list[dict[str, Any]]:
    """The turn in OpenAI's form, with paths in place of URLs."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture}} for picture in turn.pictures
    ]
    if turn.question:
        parts.append({"type": "text", "text": turn.question})
    asked = {"role": "user", "content": parts}
    return [asked, {"role": "assistant", "content": turn.answer}] if turn.answer else [asked]


def _read_picture(path: Path, limits: Limits) -> bytes:
    try:
        data = path.read_bytes()  # the upload was bounded already
    except OSError as error:
        raise MediaError("the picture is no longer on the server", remedy="add it again") from error
    decode_image(data, limits)
    return data
