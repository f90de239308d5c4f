"""One request on its way through the engine: what it is, and what it holds.

Owned by the scheduler from `add` to `drop`; the runner reads it, and nobody else writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from okavango.serving.types import Request, Usage

if TYPE_CHECKING:
    from okavango.serving.cache.parking import Parked
    from okavango.serving.speculation import Guesses
    from okavango.serving.stream import TextStream


@dataclass(eq=False)
class Sequence:
    """A request's state.

    Attributes:
        request: what was asked.
        max_tokens: most tokens to generate, the context considered.
        embeds: one tensor [M, D] a media span, what the adapter's head made of the encoder's features.
        weights: the adapter's tensors on the host, or None for the bare base.
        sampling: what the sampler keeps of it, a SamplingState.
        tokens: prompt and generated tokens.
        num_computed: tokens whose keys and values are in the cache.
        blocks: its block table; the first ones may be other sequences', too, and are full then.
        num_dropped: so many of the first are NO_BLOCK: no layer looks there any more.
        keys: what is in its first full blocks, as far as anybody has asked: see serving/cache/prefix.py.
        parked: a copy on the host of keys and values that it lost: see serving/cache/parking.py.
        slot: the adapter's slot while it runs.
        guesses: what may come next; None where that is not to be guessed.
        salt: with whom it may share what is computed: those of the same salt.
        arrival: its number in the order in which sequences came; 0 until it is queued.
        num_preempted: how often it lost its blocks.
        num_charged: tokens that its flow has been charged for; what is computed again is free.
        num_reused: prompt tokens whose blocks were there already when it first ran.
    """

    request: Request
    max_tokens: int
    embeds: tuple[Any, ...] = ()
    weights: Any = None
    sampling: Any = None
    stream: TextStream | None = None
    features_cached: int = 0
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_dropped: int = 0
    keys: list[bytes] = field(default_factory=list)
    parked: Parked | None = None
    slot: int = 0
    guesses: Guesses | None = None
    salt: str = ""
    arrival: int = 0
    num_preempted: int = 0
    num_charged: int = 0
    num_reused: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def held(self) -> list[int]:
        """The blocks of its table that it holds."""
        return self.blocks[self.num_dropped :]

    @property
    def digest(self) -> str | None:
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def flow(self) -> tuple[str, str | None]:
        """Whom its tokens are charged to: see serving/fairness.py."""
        return self.request.principal, self.digest

    @property
    def usage(self) -> Usage:
        media = sum(span.length for span in self.request.prompt.spans)
        return Usage(self.num_prompt, self.num_generated, media, self.num_reused)
