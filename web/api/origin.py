"""What made an answer, as every reply says it in its body and its headers."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from okavango.serving.types import Event, FinishReason
from okavango.web.models import Model


@dataclass(frozen=True)
class Origin:
    """What all parts of one reply share. `requested` is the model as the caller named it, `prefix` begins
    the reply's id."""

    requested: str
    model: Model
    prefix: str
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{uuid.uuid4().hex}")

    @property
    def headers(self) -> dict[str, str]:
        """A bare base has no X-Okavango-Adapter, and its digest is the base's own."""
        adapter = {"X-Okavango-Adapter": str(self.model.adapter)} if self.model.adapter else {}
        return {**adapter, "X-Okavango-Digest": self.model.digest}

    def describe(self, features_cached: int | None = None) -> dict[str, Any]:
        """`features_cached`: media of the prompt that no encoder had to see again."""
        adapter = self.model.adapter
        origin = {
            "base": self.model.base.name,
            "base_digest": self.model.base.digest,
            "adapter": str(adapter) if adapter else None,
            "adapter_digest": adapter.digest if adapter else None,
        }
        return origin if features_cached is None else {**origin, "features_cached": features_cached}

    def frame(self, kind: str) -> dict[str, Any]:
        """The fields that every body and every chunk begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.requested,
            "system_fingerprint": f"fp_{self.model.base.digest[:12]}",
        }


def finish_reason(last: Event | None) -> str:
    assert last is not None
    assert last.finish in (FinishReason.STOP, FinishReason.LENGTH), f"{last.finish} is no answer"
    return last.finish.value
