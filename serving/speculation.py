"""What may come next in a sequence: looked up in what was said (Saxena 2023), or else proposed by a draft
model (serving/drafting.py). Plain Python.

A guess is computed beside the token that is sure, and counts only as far as the sampler picks the very same
tokens. So answers are the same with and without it, greedy or drawn. It is used only where a row's logits are
the same to the bit whatever is computed beside it: see Backend.is_invariant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Source = Literal["lookup", "draft"]

_LONGEST, _SHORTEST = 3, 2  # n-grams
_MOST = 7  # tokens of one guess
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 256
_FIRST_WIDTH, _WIDER = 4, 2  # tokens of a draft, and so many more after one that was right as a whole


class Pause:
    """A sequence whose guesses fail waits before it guesses again, each time twice as many tokens."""

    def __init__(self) -> None:
        self._length = _FIRST_PAUSE
        self._resumes = 0

    def is_over(self, length: int) -> bool:
        """`length`: tokens that the sequence has."""
        return length >= self._resumes

    def learn(self, length: int, accepted: int) -> None:
        """A guess was tried, and its first `accepted` tokens were right."""
        if accepted:
            self._length = _FIRST_PAUSE
            return
        self._resumes = length + self._length
        self._length = min(2 * self._length, _LONGEST_PAUSE)


class Lookup:
    """Finds what followed the same tokens before, in one sequence that begins with these tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._read = 0
        self._pause = Pause()
        self._index(tokens)

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that followed where the sequence's last tokens stood before; () for none.

        Where too few followed, the sequence has come round: so it may again.
        """
        self._index(tokens)
        if most < 1 or not self._pause.is_over(len(tokens)):
            return ()
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            place = self._places.get(tuple(tokens[-size:]))
            if place is not None:
                around = len(tokens) - place
                return tuple(tokens[place + i % around] for i in range(min(most, _MOST)))
        return ()

    def learn(self, tokens: Sequence[int], accepted: int) -> None:
        """A guess was tried, and its first `accepted` tokens were right."""
        self._pause.learn(len(tokens), accepted)

    def _index(self, tokens: Sequence[int]) -> None:
        """Note where every n-gram was last followed by something: not yet the last one."""
        for end in range(max(self._read, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._places[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens))


class Proposals:
    """What a draft model proposes for one sequence, and how much of it is wanted."""

    def __init__(self) -> None:
        self._start = 0
        self._tokens: tuple[int, ...] = ()
        self._pause = Pause()
        self._width = _FIRST_WIDTH

    def put(self, start: int, proposed: Sequence[int]) -> None:
        """The draft model's tokens from position `start` on."""
        self._start, self._tokens = start, tuple(proposed)

    def rest(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What is proposed behind the sequence's tokens, as long as these are what was proposed before."""
        known = tuple(tokens[self._start :])
        if known != self._tokens[: len(known)]:
            return ()
        return self._tokens[len(known) :][: max(0, most)]

    def wanted(self, tokens: Sequence[int], most: int) -> int:
        """How many tokens to propose now, `most` at most: as many as were right of late, and some more."""
        return max(0, min(self._width, most)) if self._pause.is_over(len(tokens)) else 0

    def learn(self, tokens: Sequence[int], tried: int, accepted: int) -> None:
        self._pause.learn(len(tokens), accepted)
        wider = self._width + _WIDER if tried >= self._width else self._width
        self._width = min(_MOST, wider if accepted == tried else accepted + 1)

    def decline(self, tokens: Sequence[int]) -> None:
        """The draft model cannot have the sequence now."""
        self._pause.learn(len(tokens), accepted=0)


class Guesses:
    """One sequence's guesses: the look-up's, which cost nothing to make, or else the draft model's.

    Attributes:
        source: which of them the last guess came from.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.lookup = Lookup(tokens)
        self.proposals = Proposals()
        self.source: Source = "lookup"

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may come next; () for none."""
        found = self.lookup.guess(tokens, most)
        self.source = "lookup" if found else "draft"
        return found or self.proposals.rest(tokens, most)

    def learn(self, tokens: Sequence[int], tried: int, accepted: int) -> None:
        """The last guess, of `tried` tokens, was computed, and its first `accepted` tokens were right."""
        if self.source == "lookup":
            self.lookup.learn(tokens, accepted)
        else:
            self.proposals.learn(tokens, tried, accepted)
