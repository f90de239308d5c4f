"""Sides under the same workload, in turn, and what to make of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

from ours import Answer
from timing import Figures
from workload import Prompts


class Side(Protocol):
    """Something that answers prompts. `adapters`: how many the prompts are spread over; 0: the bare base."""

    @property
    def name(self) -> str: ...

    def can(self, adapters: int) -> bool: ...

    def run(self, prompts: Sequence[Sequence[int]], adapters: int, length: int) -> list[Answer]: ...


@dataclass(frozen=True)
class Case:
    """`is_single`: one request alone, measured from its first token on; else all, prompts included."""

    name: str
    adapters: int
    is_single: bool = False


@dataclass(frozen=True)
class Work:
    """`requests` prompts of `prompt` random tokens, `answer` tokens each, greedy."""

    requests: int
    prompt: int
    answer: int

    def prompts(self, seed: str, count: int, vocabulary: int) -> list[list[int]]:
        prompts = Prompts(seed, self.prompt)
        return [prompts.ids(number, vocabulary) for number in range(count)]


@dataclass(frozen=True)
class Turn:
    """One side's run of a case: tokens a second, and the first token of every answer."""

    rate: float
    first_tokens: tuple[int, ...]


# By case, then by side, then by round.
Turns = dict[str, dict[str, list[Turn]]]


@dataclass(frozen=True)
class Against:
    """Ours beside one peer: ratios of runs that stood next to each other. `first_equal`: the share of answers
    that begin with the same token. Later tokens say little: the adapters are random, and once one token
    differs, all that follow may."""

    rate: float
    ratio: float
    lowest: float
    highest: float
    first_equal: float

    @classmethod
    def of(cls, ours: Sequence[Turn], peer: Sequence[Turn]) -> Against:
        ratios = [mine.rate / other.rate for mine, other in zip(ours, peer, strict=True)]
        same = [
            one == another
            for mine, other in zip(ours, peer, strict=True)
            for one, another in zip(mine.first_tokens, other.first_tokens, strict=True)
        ]
        rate = statistics.median(turn.rate for turn in peer)
        return cls(rate, statistics.median(ratios), min(ratios), max(ratios), statistics.mean(same))


@dataclass(frozen=True)
class Summary:
    """One case: our median of tokens a second, and each peer's beside it."""

    rate: float
    lowest: float
    highest: float
    peers: dict[str, Against]

    @classmethod
    def of(cls, turns: dict[str, list[Turn]], ours: str) -> Summary:
        rates = [turn.rate for turn in turns[ours]]
        peers = {name: Against.of(turns[ours], own) for name, own in turns.items() if name != ours}
        return cls(statistics.median(rates), min(rates), max(rates), peers)


def measure(
    sides: Sequence[Side],
    cases: Sequence[Case],
    work: Work,
    vocabulary: int,
    rounds: int,
    tell: Callable[[str], None],
) -> Turns:
    """Every case in every round, after an unmeasured one. The sides take turns in going first. No prompt
    comes twice to a side, or its prefix cache would answer. `tell` hears what is being done."""
    found: Turns = {case.name: {side.name: [] for side in sides if side.can(case.adapters)} for case in cases}
    orders = list(permutations(sides))
    for number in range(rounds + 1):
        for case in cases:
            count = 1 if case.is_single else work.requests
            prompts = work.prompts(f"{number}/{case.name}", count, vocabulary)
            for side in orders[number % len(orders)]:
                if side.can(case.adapters):
                    tell(f"round {number} of {rounds}, {case.name}: {side.name}")
                    turn = take_turn(side, case, prompts, work.answer)
                    found[case.name][side.name] += [turn] if number else []
    return found


def take_turn(side: Side, case: Case, prompts: Sequence[Sequence[int]], length: int) -> Turn:
    answers = side.run(prompts, case.adapters, length)
    figures = Figures.of([answer.trace for answer in answers])
    if figures.short or len(answers) != len(prompts):
        raise RuntimeError(f"{side.name}: unequal work in {case.name}: {figures.output_tokens} tokens")
    rate = figures.decode_rate if case.is_single else figures.output_rate
    if rate is None:
        raise RuntimeError(f"{side.name}: {case.name} cannot be timed token by token; ask for longer answers")
    return Turn(rate, tuple(answer.tokens[0] for answer in answers))


def own_ratio(turns: Turns, case: str, base: str, side: str) -> float:
    """A case's speed over another's of the same side, each round by itself; the median."""
    pairs = zip(turns[case][side], turns[base][side], strict=True)
    return statistics.median(one.rate / other.rate for one, other in pairs)
