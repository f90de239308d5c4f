"""Chat answers of OpenAI's shape, and beside it an `okavango` object that says what made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from okavango.serving.types import Chosen, Event
from okavango.web.api.logprobs import TokenText, chat_logprobs
from okavango.web.api.origin import Origin, finish_reason
from okavango.web.api.replying import Choice


@dataclass(frozen=True)
class ChatShape:
    """`reports`: whether log probabilities were asked for."""

    origin: Origin
    tokens: TokenText
    reports: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return self.origin.headers

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            **self.origin.frame("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "okavango": self.origin.describe(_cached(choices)),
        }

    def opening(self, index: int) -> dict[str, Any]:
        chunk = self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        return {**chunk, "okavango": self.origin.describe()}

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        return self._chunk(index, {"content": event.text}, logprobs=self._logprobs(event.logprobs))

    def ending(self, index: int, event: Event) -> dict[str, Any]:
        chunk = self._chunk(index, {}, reason=finish_reason(event))
        return {**chunk, "okavango": self.origin.describe(event.features_cached)}

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any]:
        frame = self.origin.frame("chat.completion.chunk")
        return {**frame, "choices": [], "okavango": self.origin.describe(_cached(choices))}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text,
            "refusal": None,
            "annotations": [],
        }
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.chosen),
            "finish_reason": finish_reason(choice.last),
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.origin.frame("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        return chat_logprobs(chosen, self.tokens) if self.reports else None


def _cached(choices: Sequence[Choice]) -> int:
    """Of answers that share a prompt, one may have found what another had encoded."""
    return min(choice.last.features_cached for choice in choices if choice.last is not None)
