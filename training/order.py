"""Which rows a step takes: a function of the seed and the step alone, so that a resumed run goes on exactly.

Rows of one step have about the same length, so that little of a batch is padding. Plain Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

# Rows are sorted by length within so many steps' worth of them: enough to save padding, few enough to mix.
_WINDOW = 16

Rows = tuple[int, ...]


class DataOrder:
    """Row numbers by step, each row once an epoch.

    Args:
        lengths: tokens a row.
        batch_size: rows that are computed at a time.
        accumulation: batches a step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, accumulation: int, seed: int) -> None:
        assert lengths
        self._lengths = tuple(lengths)
        self._batch_size = batch_size
        self._rows_a_step = batch_size * accumulation
        self._seed = seed
        self.steps_an_epoch = -(-len(lengths) // self._rows_a_step)
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def batches(self, step: int) -> tuple[Rows, ...]:
        """The batches of a step, counted from 0 over all epochs. The last step of an epoch may be small."""
        epoch, within = divmod(step, self.steps_an_epoch)
        rows = self._epoch(epoch)[within]
        return tuple(rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size))

    def _plan(self, epoch: int) -> list[Rows]:
        chance = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(self._lengths)))
        chance.shuffle(rows)
        window = _WINDOW * self._rows_a_step
        steps = [
            step
            for start in range(0, len(rows), window)
            for step in self._sorted_steps(rows[start : start + window])
        ]
        chance.shuffle(steps)
        return steps

    def _sorted_steps(self, rows: list[int]) -> list[Rows]:
        rows = sorted(rows, key=lambda row: self._lengths[row])
        return [tuple(rows[i : i + self._rows_a_step]) for i in range(0, len(rows), self._rows_a_step)]
