"""The types that every part of serving shares. No torch: they are what web and the scheduler speak."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import InputError, OkavangoError


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version. Identity is the digest; the name is for people."""

    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class AdapterSource(Protocol):
    """Where the engine gets bundles from; web backs it with the catalog and the artifact store."""

    def fetch(self, digest: str) -> Path:
        """A local folder that holds the verified bundle. May block. Raises NotFoundError, IntegrityError."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked.

    Attributes:
        max_tokens: most tokens to generate; None means as many as the context leaves.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probabilities reach this sum.
        seed: the same seed gives the same tokens; None draws one.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on past the end-of-turn token.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"must be at least 1, not {self.max_tokens}", where="max_tokens")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"must be between 0 and 2, not {self.temperature}", where="temperature")
        if not 0 < self.top_p <= 1:
            raise InputError(f"must be above 0 and at most 1, not {self.top_p}", where="top_p")
        if len(self.stop) > 16 or not all(self.stop):
            raise InputError("at most 16 strings, none of them empty", where="stop")


@dataclass(frozen=True)
class Request:
    """One prompt for the engine. `id` is unique; `adapter` None means the bare base."""

    id: str
    prompt: Rendered
    adapter: AdapterRef | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    principal: str = "local"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class Usage:
    """Token counts. `media_tokens` are part of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The last event of a request has a `finish` (and an `error` if it failed).

    Attributes:
        text: what is new; "" where a token is not yet whole text.
        tokens: ids that are new.
        features_cached: media whose encoder features were there already; set on the last event.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    error: OkavangoError | None = None
    features_cached: int = 0
