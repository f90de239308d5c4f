"""One rendering for training and serving: a conversation → tokens, media spans, loss mask.

Text is tokenised in segments that end where an assistant's turn begins and where it ends. Serving tokenises
a prompt up to the first of these places, so training sees exactly the tokens that serving will feed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from jinja2.exceptions import TemplateError

from okavango.modalities.content import Media, Message, Part, Text
from okavango.platform.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Where a medium's embeddings go: tokens[start : start + length] get those from `offset` on.

    `looks_ahead`: whether its positions see each other, later ones too. `grid`: their rows and columns, where
    the decoder tells them apart.
    """

    modality: str
    start: int
    length: int
    offset: int = 0
    looks_ahead: bool = False
    grid: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Rendered:
    """A conversation as the decoder sees it.

    Attributes:
        tokens: ids; a media position holds the placeholder id, whose embedding is replaced.
        spans: in order, disjoint; one a medium, or several where its encoder wants text in between.
        media: what fills the spans, one a span.
        loss: one flag a token: an assistant's own token, its end-of-turn included.
    """

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    media: tuple[Media, ...] = ()
    loss: tuple[bool, ...] = ()


Layout = tuple[str | int | tuple[int, int], ...]
"""What stands for a medium: texts, and numbers of embeddings, or rows and columns of them where the decoder
tells these apart."""


class Layouts(Protocol):
    """See modalities/encoders.py."""

    def of(self, medium: Media) -> Layout | None:
        """None where there is no encoder for it."""


class Renderer:
    """Renders with one tokenizer and its chat template.

    Args:
        marks: by modality, what the template itself writes for a medium; such a template takes a message as
            parts, as that of a pretrained vision-language model does.
        looking_ahead: modalities whose positions see each other, later ones too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layouts: Layouts,
        marks: Mapping[str, str] | None = None,
        looking_ahead: Collection[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.layouts = layouts
        self._marks = dict(marks or {})
        self._looking_ahead = frozenset(looking_ahead)
        self._eos = _eos_ids(tokenizer)
        self._placeholder = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )

    def prompt(self, messages: Sequence[Message], system: str | None = None) -> Rendered:
        """What a request feeds the decoder: the conversation and the start of the assistant's answer.

        Raises:
            PromptError: the template refuses the messages, or no encoder serves a medium's modality.
            MediaError: a medium is such that its length cannot be told.
        """
        return self._render(with_system(messages, system), generate=True)

    def conversation(self, messages: Sequence[Message], system: str | None = None) -> Rendered:
        """What training feeds: the whole conversation, with loss on the assistant's tokens that are learned.

        Raises:
            PromptError: as prompt; or the template is such that no turn's tokens can be told apart.
        """
        rendered = self._render(with_system(messages, system), generate=False)
        if not any(rendered.loss):
            raise PromptError("no assistant's turn can be told apart in the chat template's output")
        return rendered

    def _render(self, messages: Sequence[Message], *, generate: bool) -> Rendered:
        media = [medium for message in messages for medium in message.media]
        mark = _unused_mark(messages)
        draft = _Draft()
        coming = iter(media)
        for text, is_answer in self._segments(messages, mark, generate):
            open_answer = is_answer
            for piece in _joined(self._pieces(text, mark, coming)):
                if isinstance(piece, _Fill):
                    ahead = piece.medium.modality in self._looking_ahead
                    draft.fill(piece, self._placeholder, looks_ahead=ahead)
                    continue
                for token in self._tokenize(piece):
                    draft.tokens.append(token)
                    draft.loss.append(open_answer)
                    open_answer = open_answer and token not in self._eos
        left = sum(1 for _ in coming)
        if left:
            raise PromptError(f"the chat template shows {len(media) - left} of {len(media)} media")
        return draft.finish()

    def _pieces(self, text: str, mark: str, coming: Iterator[Media]) -> Iterator[str | _Fill]:
        """A segment's texts, with what stands for each medium in place of its mark."""
        marks = [mark, *self._marks.values()]
        for piece in re.split(f"({'|'.join(map(re.escape, marks))})", text):
            if piece not in marks:
                yield piece
                continue
            medium = next(coming, None)
            if medium is None or piece != self._marks.get(medium.modality, mark):
                raise PromptError("the chat template shows other media than the conversation holds")
            yield from self._stand_in(medium)

    def _stand_in(self, medium: Media) -> Iterator[str | _Fill]:
        layout = self.layouts.of(medium)
        if layout is None:
            raise PromptError(
                f"this base has no {medium.modality} encoder",
                remedy="okavango base add makes a base with one",
            )
        offset = 0
        for piece in layout:
            if isinstance(piece, str):
                yield piece
                continue
            grid = piece if isinstance(piece, tuple) else None
            count = piece if isinstance(piece, int) else piece[0] * piece[1]
            yield _Fill(medium, offset, count, grid)
            offset += count

    def _content(self, message: Message, mark: str) -> str | list[dict[str, str]]:
        if not self._marks:
            return "".join(part.text if isinstance(part, Text) else mark for part in message.parts)
        for own in self._marks.values():
            if own in message.text:
                raise PromptError(f"the text holds {own}, which stands for a medium in this base's prompts")
        return [self._part(part, mark) for part in message.parts]

    def _part(self, part: Part, mark: str) -> dict[str, str]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if part.modality in self._marks:
            return {"type": part.modality}
        return {"type": "text", "text": mark}

    def _segments(self, messages: Sequence[Message], mark: str, generate: bool) -> Iterator[tuple[str, bool]]:
        """(text, is an assistant's turn that is learned), which joined are the template's output."""
        chat = [{"role": message.role, "content": self._content(message, mark)} for message in messages]
        whole = self._template(chat, generate)
        done = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, after = self._template(chat[:i], True), self._template(chat[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                continue  # a template that rewrites its history: this turn is prompt text alone
            yield whole[done : len(before)], False
            yield whole[len(before) : len(after)], message.is_learned
            done = len(after)
        yield whole[done:], False

    def _template(self, chat: list[dict[str, Any]], generate: bool) -> str:
        if not chat:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, ValueError, TypeError) as error:
            raise PromptError(f"the base's chat template refuses the conversation: {error}") from error
        return str(text)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@dataclass(frozen=True)
class _Fill:
    """`count` of a medium's embeddings, from `offset` on."""

    medium: Media
    offset: int
    count: int
    grid: tuple[int, int] | None = None


@dataclass
class _Draft:
    """A conversation while it is rendered; as Rendered."""

    tokens: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)

    def fill(self, piece: _Fill, placeholder: int, *, looks_ahead: bool) -> None:
        modality, start = piece.medium.modality, len(self.tokens)
        self.spans.append(Span(modality, start, piece.count, piece.offset, looks_ahead, piece.grid))
        self.media.append(piece.medium)
        self.tokens += [placeholder] * piece.count
        self.loss += [False] * piece.count

    def finish(self) -> Rendered:
        return Rendered(tuple(self.tokens), tuple(self.spans), tuple(self.media), tuple(self.loss))


def with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The messages, led by a default system prompt where they have none of their own."""
    if system is None or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", (Text(system),)), *messages)


def truncate(rendered: Rendered, length: int) -> Rendered:
    """The first `length` tokens, with the spans and media that lie wholly inside."""
    spans = tuple(span for span in rendered.spans if span.end <= length)
    return replace(
        rendered,
        tokens=rendered.tokens[:length],
        spans=spans,
        media=rendered.media[: len(spans)],
        loss=rendered.loss[:length],
    )


def _joined(pieces: Iterable[str | _Fill]) -> Iterator[str | _Fill]:
    """With texts that follow each other in one piece, since tokens may reach across."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        yield text
        yield piece
        text = ""
    yield text


def _unused_mark(messages: Sequence[Message]) -> str:
    """A stand-in for media that no message contains, so that no text can pass for a picture."""
    text = "".join(message.text for message in messages)
    return next(mark for n in range(len(text) + 2) if (mark := f"\ue000media{n}\ue001") not in text)


def _eos_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
