"""Tokens → text as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
# So many tokens without one whole character between them are no character's beginning any more.
_MOST_PENDING = 32


class TextStream:
    """Detokenises one answer incrementally.

    Text is held back while its last bytes are no whole character, and while it may be the start of a stop
    string. Each time only a short tail of tokens is decoded anew. Stop strings are looked for in the text
    from the `min_tokens`th token on; what comes before is text like any other.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._read = 0  # tokens before this are wholly in the text
        self._context = 0  # tokens from here to _read are decoded as left context
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that is new and sure."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        is_pending = text.endswith(_INCOMPLETE) or len(text) <= len(before)
        if is_pending and len(self._tokens) - self._read < _MOST_PENDING:
            return ""
        self._context, self._read = self._read, len(self._tokens)
        self._held += text[len(before) :]
        return self._release()

    def flush(self) -> str:
        """What is still held back when the answer ends otherwise than by a stop string."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._context : self._read])
        rest = self._decode(self._tokens[self._context :])[len(before) :]
        text, self._held = self._held + rest, ""
        self._context = self._read = len(self._tokens)
        return text

    def _release(self) -> str:
        if len(self._tokens) < self._min_tokens:
            text, self._held = self._held, ""
            return text
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
