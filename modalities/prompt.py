"""One rendering for training and serving: a conversation → tokens, media spans, loss mask.

Text is tokenised in segments that end where an assistant's turn begins and where it ends. Serving tokenises
a prompt up to the first of these places, so training sees exactly the tokens that serving will feed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from okavango.modalities.content import Media, Message, Text
from okavango.platform.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Where a medium's embeddings go: tokens[start : start + length]."""

    modality: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Rendered:
    """A conversation as the decoder sees it.

    Attributes:
        tokens: ids; a media position holds the placeholder id, whose embedding is replaced.
        spans: one a medium, in order, disjoint.
        media: what fills the spans.
        loss: one flag a token: an assistant's own token, its end-of-turn included.
    """

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    media: tuple[Media, ...] = ()
    loss: tuple[bool, ...] = ()


class Renderer:
    """Renders with one tokenizer and its chat template.

    Args:
        media_tokens: decoder tokens a medium takes, by modality.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, media_tokens: Mapping[str, int]) -> None:
        self.tokenizer = tokenizer
        self.media_tokens = dict(media_tokens)
        self._eos = _eos_ids(tokenizer)
        self._placeholder = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )

    def prompt(self, messages: Sequence[Message], system: str | None = None) -> Rendered:
        """What a request feeds the decoder: the conversation and the start of the assistant's answer.

        Raises:
            PromptError: the template refuses the messages, or no encoder serves a medium's modality.
        """
        return self._render(with_system(messages, system), generate=True)

    def conversation(self, messages: Sequence[Message], system: str | None = None) -> Rendered:
        """What training feeds: the whole conversation, with loss on the assistant's tokens.

        Raises:
            PromptError: as prompt; or the template is such that no turn's tokens can be told apart.
        """
        rendered = self._render(with_system(messages, system), generate=False)
        if not any(rendered.loss):
            raise PromptError("no assistant's turn can be told apart in the chat template's output")
        return rendered

    def _render(self, messages: Sequence[Message], *, generate: bool) -> Rendered:
        media = tuple(medium for message in messages for medium in message.media)
        mark = _unused_mark(messages)
        tokens: list[int] = []
        loss: list[bool] = []
        spans: list[Span] = []
        for text, is_answer in self._segments(messages, mark, generate):
            open_answer = is_answer
            for i, piece in enumerate(text.split(mark)):
                if i > 0:
                    spans.append(self._span(media[len(spans)].modality, len(tokens)))
                    tokens += [self._placeholder] * spans[-1].length
                    loss += [False] * spans[-1].length
                for token in self._tokenize(piece):
                    tokens.append(token)
                    loss.append(open_answer)
                    open_answer = open_answer and token not in self._eos
        if len(spans) != len(media):
            raise PromptError(f"the chat template shows {len(spans)} of {len(media)} media")
        return Rendered(tuple(tokens), tuple(spans), media, tuple(loss))

    def _segments(self, messages: Sequence[Message], mark: str, generate: bool) -> Iterator[tuple[str, bool]]:
        """(text, is an assistant's turn), which joined are the template's output."""
        chat = [{"role": message.role, "content": _content(message, mark)} for message in messages]
        whole = self._template(chat, generate)
        done = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, after = self._template(chat[:i], True), self._template(chat[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                continue  # a template that rewrites its history: this turn is prompt text alone
            yield whole[done : len(before)], False
            yield whole[len(before) : len(after)], True
            done = len(after)
        yield whole[done:], False

    def _template(self, chat: list[dict[str, str]], generate: bool) -> str:
        if not chat:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, ValueError, TypeError) as error:
            raise PromptError(f"the base's chat template refuses the conversation: {error}") from error
        return str(text)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _span(self, modality: str, start: int) -> Span:
        if modality not in self.media_tokens:
            raise PromptError(
                f"this base has no encoder for {modality}s",
                remedy="okavango base add --image-encoder makes a base with one",
            )
        return Span(modality, start, self.media_tokens[modality])


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


def _content(message: Message, mark: str) -> str:
    return "".join(part.text if isinstance(part, Text) else mark for part in message.parts)


def _unused_mark(messages: Sequence[Message]) -> str:
    """A stand-in for media that no message contains, so that no text can pass for a picture."""
    text = "".join(message.text for message in messages)
    return next(mark for n in range(len(text) + 2) if (mark := f"\ue000media{n}\ue001") not in text)


def _eos_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
