"""What may come next, guessed from what came before: prompt look-up (Saxena 2023). Plain Python.

A guess is computed beside the token that is sure, and counts only as far as the sampler picks the very same
tokens. So answers are the same with and without it, greedy or drawn. It is used only where a row's logits are
the same to the bit whatever is computed beside it: see Backend.is_invariant.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2  # n-grams
_MOST = 7  # tokens of one guess
# A sequence whose guesses fail waits before it guesses again, each time twice as long.
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 256


class Lookup:
    """Guesses for one sequence, that begins with these tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._read = 0
        self._pause = _FIRST_PAUSE
        self._resumes = 0
        self._index(tokens)

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that followed where the sequence's last tokens stood before; () for none."""
        self._index(tokens)
        if most < 1 or len(tokens) < self._resumes:
            return ()
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            place = self._places.get(tuple(tokens[-size:]))
            if place is not None:
                return tuple(tokens[place : place + min(most, _MOST)])
        return ()

    def learn(self, tokens: Sequence[int], accepted: int) -> None:
        """A guess was tried, and its first `accepted` tokens were right."""
        if accepted:
            self._pause = _FIRST_PAUSE
            return
        self._resumes = len(tokens) + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _index(self, tokens: Sequence[int]) -> None:
        """Note where every n-gram was last followed by something: not yet the last one."""
        for end in range(max(self._read, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._places[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens))
