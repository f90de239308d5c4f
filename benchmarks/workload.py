"""Prompts, arrivals and whom to ask, by seed. Plain Python: no torch, no HTTP.

A request's prompt depends on the seed and its own number alone, so more requests leave the first ones as they
were. Runs that follow each other on one server want different seeds: a prefix cache would know the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TypeVar

Choice = TypeVar("Choice")

# Tokenizers keep their special tokens below.
FIRST_ID = 100
WORDS = (
    *("river", "water", "boat", "green", "house", "under", "morning", "small", "bridge", "paper", "road"),
    *("window", "letter", "garden", "music", "winter", "summer", "market", "bread", "stone", "light"),
    *("evening", "story", "table", "north", "south", "island", "forest", "horse", "train", "cloud"),
    *("yellow", "simple", "quiet", "open", "early", "many", "another", "between", "across", "always"),
)


@dataclass(frozen=True)
class Prompts:
    """Random prompts of `length` tokens or words, of which the first `shared` are the same in all."""

    seed: str
    length: int
    shared: int = 0

    def ids(self, number: int, vocabulary: int) -> list[int]:
        """The prompt of one request as token ids below `vocabulary`."""
        return self._draw(number, range(min(FIRST_ID, vocabulary // 2), vocabulary))

    def text(self, number: int) -> str:
        """The prompt of one request as words; most are one token in most vocabularies."""
        return " ".join(self._draw(number, WORDS))

    def _draw(self, number: int, among: Sequence[Choice]) -> list[Choice]:
        shared = min(self.shared, self.length)
        common, own = Random(f"{self.seed}/shared"), Random(f"{self.seed}/{number}")
        return common.choices(among, k=shared) + own.choices(among, k=self.length - shared)


def poisson(seed: str, count: int, rate: float) -> list[float]:
    """Seconds after the start at which requests arrive, `rate` of them a second on average."""
    random = Random(f"{seed}/arrivals")
    return list(accumulate(random.expovariate(rate) for _ in range(count)))


def spread(seed: str, count: int, among: Sequence[Choice], skew: float | None = None) -> list[Choice]:
    """Whom each request asks: all in turn, or, with a skew s, the k-th at random with weight k^-s (Zipf)."""
    if skew is None:
        return [among[i % len(among)] for i in range(count)]
    weights = [(rank + 1) ** -skew for rank in range(len(among))]
    return Random(f"{seed}/spread").choices(among, weights, k=count)
