"""Which rows a step takes: a function of the seed and the step alone, so that a resumed run goes on exactly.

Rows of one batch have about the same length, so that little of it is padding. Plain Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import TypeVar

# Rows are sorted by length within so many steps' worth of them: enough to save padding, few enough to mix.
_WINDOW = 16

Item = TypeVar("Item")
Rows = tuple[int, ...]
Batches = tuple[Rows, ...]


class DataOrder:
    """Row numbers by step, each row once an epoch.

    Args:
        lengths: tokens a row.
        batch_size: rows that are computed at a time.
        accumulation: batches a step.
        batch_tokens: in place of batch_size, a batch takes as many rows as fit into so many tokens when all
            are as long as its longest. No row is longer than that.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int,
        seed: int,
        batch_tokens: int | None = None,
    ) -> None:
        assert lengths
        self._lengths = tuple(lengths)
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        # equally many in each epoch: they depend on the lengths alone
        self._sizes = _filled(sorted(lengths, reverse=True), batch_tokens) if batch_tokens else []
        rows_a_step = batch_size * accumulation
        by_rows, by_tokens = -(-len(lengths) // rows_a_step), -(-len(self._sizes) // accumulation)
        self.steps_an_epoch = by_tokens if batch_tokens else by_rows
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def batches(self, step: int) -> Batches:
        """The batches of a step, counted from 0 over all epochs. The last step of an epoch may be small."""
        epoch, within = divmod(step, self.steps_an_epoch)
        return self._epoch(epoch)[within]

    def _plan(self, epoch: int) -> list[Batches]:
        chance = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(self._lengths)))
        chance.shuffle(rows)
        return self._by_tokens(rows, chance) if self._sizes else self._by_rows(rows, chance)

    def _by_rows(self, rows: list[int], chance: random.Random) -> list[Batches]:
        rows_a_step = self._batch_size * self._accumulation
        window = _WINDOW * rows_a_step
        steps = []
        for start in range(0, len(rows), window):
            ordered = sorted(rows[start : start + window], key=lambda row: self._lengths[row])
            steps += _pieces(ordered, rows_a_step)
        chance.shuffle(steps)
        return [tuple(map(tuple, _pieces(step, self._batch_size))) for step in steps]

    def _by_tokens(self, rows: list[int], chance: random.Random) -> list[Batches]:
        """Rows as long as each other meet others in each epoch, since the sort leaves them as they come."""
        ordered = iter(sorted(rows, key=lambda row: self._lengths[row], reverse=True))
        batches = [tuple(islice(ordered, size)) for size in self._sizes]
        chance.shuffle(batches)
        return [tuple(step) for step in _pieces(batches, self._accumulation)]


def _filled(lengths: Sequence[int], batch_tokens: int) -> list[int]:
    """Rows of each batch: of lengths that fall, as many as fit."""
    sizes, done = [], 0
    while done < len(lengths):
        sizes.append(min(len(lengths) - done, max(1, batch_tokens // lengths[done])))
        done += sizes[-1]
    return sizes


def _pieces(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
