"""Turns → what gr.Chatbot shows: question and media, answer, and a line about what made it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from okavango.web.studio.asking import STOPPED
from okavango.web.studio.conversation import Conversation, Provenance, Turn, modality_of
from okavango.web.studio.markup import copyable, digest, fault

Bubble = dict[str, Any]

_ENDINGS = {
    "length": ("cut off", "at Max tokens; see Sampling"),
    STOPPED: ("stopped", "by you"),
}


def bubbles(turns: Conversation) -> list[Bubble]:
    return [bubble for turn in turns for bubble in _of_turn(turn)]


def provenance(made_by: Provenance, answer: str) -> str:
    """The line under an answer, as HTML."""
    facts = [
        f'<span class="okv-model">{escape(made_by.model)}</span>',
        digest(made_by.digest),
        *(f'<span title="{escape(tip)}">{escape(fact)}</span>' for fact, tip in _facts(made_by)),
        copyable(answer, "copy"),
    ]
    notes = "".join(f'<p class="okv-note">{escape(note)}</p>' for note in made_by.notes)
    return f'<div class="okv-made">{"".join(facts)}</div>{notes}'


def _of_turn(turn: Turn) -> Iterator[Bubble]:
    files: list[Any] = [_file(path) for path in turn.media]
    yield {"role": "user", "content": [*files, *([_text(turn.question)] if turn.question else [])]}
    if turn.answer:
        yield {"role": "assistant", "content": [_text(turn.answer)]}
    if turn.made_by is not None and turn.answer:
        yield {"role": "assistant", "content": [_html(provenance(turn.made_by, turn.answer))]}
    if turn.fault is not None:
        yield {"role": "assistant", "content": [_html(fault(turn.fault))]}


def _file(path: str) -> Bubble:
    return {"path": path, "alt_text": None if modality_of(path) == "audio" else "picture of the question"}


def _text(text: str) -> Bubble:
    return {"type": "text", "text": text}


def _html(html: str) -> gr.HTML:
    """Ours, and escaped already. As text it would pass the sanitiser, which leaves no data-copy."""
    return gr.HTML(html, apply_default_css=False, render=False)


def _facts(made_by: Provenance) -> Iterator[tuple[str, str]]:
    """(fact, what it means)"""
    count = f"{made_by.completion_tokens:,} tokens"
    if made_by.prompt_tokens is None:
        yield count, "in the answer"
    else:
        yield f"{made_by.prompt_tokens:,} → {count}", "in the prompt, its media included → in the answer"
    yield f"{made_by.seconds:.2f} s", "from the question to the last token"
    if made_by.tokens_per_second is not None:
        yield f"{made_by.tokens_per_second:.3g} tokens/s", "from the first token to the last"
    if made_by.media and made_by.cached is not None:
        yield _cache(made_by.media, made_by.cached), "whether the encoder ran, or had seen it before"
    if made_by.ending in _ENDINGS:
        yield _ENDINGS[made_by.ending]


def _cache(media: int, cached: int) -> str:
    if media == 1:
        return "features from cache" if cached else "features computed"
    return f"{cached} of {media} features from cache"
