"""Completions of OpenAI's older shape, and beside it an `okavango` object that says what made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from okavango.serving.types import Chosen, Event
from okavango.web.api.logprobs import LegacyLogprobs, TokenText
from okavango.web.api.origin import Origin, finish_reason
from okavango.web.api.replying import Choice


@dataclass(frozen=True)
class CompletionShape:
    """
    Attributes:
        echoes: the prompts as text, to begin each answer with; or empty.
        each: answers a prompt that were asked for.
        kept: answers a prompt that are given: the likeliest by mean log probability.
        reports: whether log probabilities were asked for.
    """

    origin: Origin
    tokens: TokenText
    each: int = 1
    kept: int = 1
    echoes: tuple[str, ...] = ()
    reports: bool = False
    _logprobs: dict[int, LegacyLogprobs] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return self.origin.headers

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        best = [at for start in range(0, len(choices), self.each) for at in self._best(choices, start)]
        return {
            **self.origin.frame("text_completion"),
            "choices": [self._choice(index, at, choices[at]) for index, at in enumerate(best)],
            "okavango": self.origin.describe(),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echo(index)
        return self._chunk(index, echo) if echo else None

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        return self._chunk(index, event.text, logprobs=self._reported(index, event.logprobs))

    def ending(self, index: int, event: Event) -> dict[str, Any]:
        return {**self._chunk(index, "", reason=finish_reason(event)), "okavango": self.origin.describe()}

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any]:
        frame = self.origin.frame("text_completion")
        return {**frame, "choices": [], "okavango": self.origin.describe()}

    def _best(self, choices: Sequence[Choice], start: int) -> list[int]:
        found = range(start, start + self.each)
        if self.kept == self.each:
            return list(found)
        return sorted(found, key=lambda at: -choices[at].mean_logprob)[: self.kept]

    def _choice(self, index: int, at: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo(at) + choice.text,
            "logprobs": self._reported(at, choice.chosen),
            "finish_reason": finish_reason(choice.last),
        }

    def _chunk(
        self, index: int, text: str, *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self.origin.frame("text_completion"), "choices": [choice]}

    def _echo(self, at: int) -> str:
        return self.echoes[at // self.each] if self.echoes else ""

    def _reported(self, at: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self.reports:
            return None
        return self._logprobs.setdefault(at, LegacyLogprobs(self.tokens)).shape(chosen)
