"""The types that every part of serving shares. No torch: they are what web and the scheduler speak."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

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
class Guide:
    """What an answer must look like: `kind` is json_schema, regex or grammar (Lark), `text` its source."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked.

    Attributes:
        max_tokens: most tokens to generate; None means as many as the context leaves.
        min_tokens: no end-of-turn token and no stop string ends the answer before so many.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probabilities reach this sum.
        top_k: so many of the likeliest tokens; 0 means all.
        min_p: tokens at least this fraction as likely as the likeliest.
        presence_penalty: taken off the logit of every token that the answer holds already.
        frequency_penalty: the same, times how often it does.
        repetition_penalty: divides positive logits, multiplies negative ones, of tokens in prompt or answer
            (Keskar et al. 2019).
        logit_bias: (token, added to its logit).
        seed: the same seed gives the same tokens; None draws one.
        logprobs: alternatives to report a token; None reports nothing, 0 the token's own alone.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on past the end-of-turn token.
        guide: what the answer must look like, or None.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"must be at least 1, not {self.max_tokens}", where="max_tokens")
        if self.min_tokens > (self.max_tokens or self.min_tokens):
            raise InputError(f"must be at most max_tokens, not {self.min_tokens}", where="min_tokens")
        if len(self.stop) > 16 or not all(self.stop):
            raise InputError("at most 16 strings, none of them empty", where="stop")
        if not 0 < self.top_p <= 1:
            raise InputError(f"must be above 0 and at most 1, not {self.top_p}", where="top_p")
        if not self.repetition_penalty > 0:
            raise InputError(f"must be above 0, not {self.repetition_penalty}", where="repetition_penalty")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"must be between {least} and {most}, not {value}", where=name)


_RANGES = {
    "min_tokens": (0, 1 << 31),
    "temperature": (0, 2),
    "top_k": (0, 1 << 31),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, 20),
}


@dataclass(frozen=True)
class Chosen:
    """A token with its logarithmic probability, before temperature and cuts.

    `top`: the likeliest tokens, in falling order, the token itself among them where it is one of these.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt for the engine. `id` is unique; `adapter` None means the bare base.

    `priority`: lower goes first, within what fairness leaves. `timeout`: seconds from `submit` to the last
    token; what is not done by then ends with FinishReason.TIMEOUT.
    """

    id: str
    prompt: Rendered
    adapter: AdapterRef | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    principal: str = "local"
    priority: int = 0
    timeout: float | None = None


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Usage:
    """Token counts. Of `prompt_tokens`, `media_tokens` are media's and `cached_tokens` were there already."""

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The last event of a request has a `finish` (and an `error` if it failed).

    Attributes:
        text: what is new; "" where a token is not yet whole text.
        tokens: ids that are new.
        logprobs: one a new token, where the request asked for them.
        features_cached: media whose encoder features were there already; set on the last event.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    error: OkavangoError | None = None
    features_cached: int = 0
    logprobs: tuple[Chosen, ...] = ()
