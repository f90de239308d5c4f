"""Answers of OpenAI's shape, and beside it an `okavango` object that says what made them."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from okavango.serving.types import Event, FinishReason, Usage
from okavango.web.models import Model


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer share. `requested` is the model as the caller named it."""

    requested: str
    model: Model
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        """A bare base has no X-Okavango-Adapter, and its digest is the base's own."""
        adapter = {"X-Okavango-Adapter": str(self.model.adapter)} if self.model.adapter else {}
        return {**adapter, "X-Okavango-Digest": self.model.digest}

    def origin(self, features_cached: int | None = None) -> dict[str, Any]:
        """What made the answer. `features_cached`: its media that no encoder had to see again."""
        adapter = self.model.adapter
        origin = {
            "base": self.model.base.name,
            "base_digest": self.model.base.digest,
            "adapter": str(adapter) if adapter else None,
            "adapter_digest": adapter.digest if adapter else None,
        }
        return origin if features_cached is None else {**origin, "features_cached": features_cached}

    def completion(self, text: str, last: Event) -> dict[str, Any]:
        """The whole answer. `last` is the event that ended it."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(last)}
        return {
            **self._frame("chat.completion"),
            "choices": [choice],
            "usage": usage_of(last.usage),
            "okavango": self.origin(last.features_cached),
        }

    def role_chunk(self) -> dict[str, Any]:
        return {
            **self._chunk({"role": "assistant", "content": "", "refusal": None}),
            "okavango": self.origin(),
        }

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def last_chunk(self, last: Event) -> dict[str, Any]:
        return {**self._chunk({}, _reason(last)), "okavango": self.origin(last.features_cached)}

    def usage_chunk(self, last: Event) -> dict[str, Any]:
        """After the last chunk, where the caller asked for it."""
        return {
            **self._frame("chat.completion.chunk"),
            "choices": [],
            "usage": usage_of(last.usage),
            "okavango": self.origin(last.features_cached),
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.requested,
            "system_fingerprint": f"fp_{self.model.base.digest[:12]}",
        }


def usage_of(usage: Usage | None) -> dict[str, Any] | None:
    """Token counts; media's tokens are part of the prompt's."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"image_tokens": usage.media_tokens},
    }


def _reason(last: Event) -> str:
    assert last.finish in (FinishReason.STOP, FinishReason.LENGTH), f"{last.finish} is no answer"
    return last.finish.value
