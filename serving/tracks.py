"""How far a draft model has read a sequence, and what it was fed beyond that. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import takewhile

from okavango.modalities.prompt import Rendered
from okavango.serving.sequence import Sequence
from okavango.serving.step import Chunk
from okavango.serving.types import Request


@dataclass(eq=False)
class Track:
    """How far the draft model has read a sequence.

    Attributes:
        shadow: the sequence as the draft model sees it: without adapter and media, on blocks of its own.
        skipped: the media positions that it leaves out.
        fed: what it was fed of its own proposals, and may stand in the cache behind the shadow's tokens.
    """

    shadow: Sequence
    skipped: int
    fed: tuple[int, ...] = ()

    @classmethod
    def of(cls, sequence: Sequence) -> Track:
        prompt = sequence.request.prompt
        media = {position for span in prompt.spans for position in range(span.start, span.end)}
        tokens = tuple(token for position, token in enumerate(prompt.tokens) if position not in media)
        shadow = Sequence(Request(sequence.request.id, Rendered(tokens)), max_tokens=0, salt=sequence.salt)
        return cls(shadow, len(media))

    @property
    def num_unread(self) -> int:
        return self.shadow.num_uncomputed

    def follow(self, sequence: Sequence) -> int:
        """Take over the sequence's new tokens. How many of them the cache holds, since they were proposed."""
        shadow = self.shadow
        new = sequence.tokens[len(shadow.tokens) + self.skipped :]
        shadow.tokens += new
        right = 0
        if len(new) == shadow.num_uncomputed:  # nothing before them is unread
            right = _common(self.fed, new[:-1])  # the last one's logits are needed
        self.fed = ()
        shadow.num_computed += right
        return right

    def chunk(self, proposed: Tokens[int]) -> Chunk:
        """What to compute next: what is unread, or else the last of the proposals behind it."""
        shadow = self.shadow
        if not proposed:
            return Chunk(shadow, shadow.num_computed, self.num_unread)
        return Chunk(shadow, len(shadow.tokens) + len(proposed) - 1, 1, (proposed[-1],))


def _common(fed: Iterable[int], said: Iterable[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(fed, said, strict=False)))
