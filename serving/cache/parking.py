"""Keys and values of preempted sequences, kept on the host instead of computed again. Plain Python.

Decides which; a `Parker` copies. Parking pays where copying out and back in takes less time than computing
the tokens again, as both were measured here: on a GPU mostly, for long sequences. Within a step, parking
comes before everything that writes to blocks, then restoring.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Blocks
from dataclasses import dataclass
from typing import Any, Protocol

from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.tables import drop
from okavango.serving.sequence import Sequence

_NEWEST = 0.2  # weight of the newest measurement in a running mean


class Parker(Protocol):
    """What copies blocks' keys and values, all layers of them."""

    def park(self, blocks: Blocks[int]) -> Any:
        """A copy of these blocks on the host."""
        ...

    def restore(self, parked: Any, first: int, blocks: Blocks[int]) -> None:
        """Fill blocks with a copy's own, from its number `first` on."""
        ...


@dataclass(frozen=True)
class Move:
    """Copy a sequence's blocks, the first of them number `first` of its copy; it has `tokens` tokens then."""

    sequence: Sequence
    blocks: tuple[int, ...]
    first: int
    tokens: int


@dataclass(frozen=True)
class Parked:
    """A sequence of `tokens` tokens: all `blocks` that it held, its last ones; `data` is the parker's."""

    tokens: int
    blocks: int
    data: Any


class Parking:
    """Room for `capacity` blocks on the host, and what this step moves there and back."""

    def __init__(self, capacity: int, pool: BlockPool) -> None:
        self.capacity = capacity
        self._pool = pool
        self._parks: list[Move] = []
        self._restores: dict[Sequence, Move] = {}
        self._seconds_per_token = 0.0
        self._seconds_per_block = 0.0

    @property
    def parks(self) -> tuple[Move, ...]:
        return tuple(self._parks)

    @property
    def restores(self) -> tuple[Move, ...]:
        return tuple(self._restores.values())

    def begin(self) -> None:
        """A new step: what the former one had to move is moved."""
        self._parks, self._restores = [], {}

    def leave(self, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """A running sequence is about to lose its blocks. `waiting`: who may have some parked."""
        if self._restores.pop(sequence, None) is not None:
            return  # it came back in this very step; its copy is still there
        blocks = tuple(sequence.blocks[sequence.num_dropped : self._pool.blocks_for(sequence.num_computed)])
        used = sum(other.parked.blocks for other in waiting if other.parked is not None)
        used += sum(len(move.blocks) for move in self._parks)
        if used + len(blocks) <= self.capacity and self.pays(sequence.num_computed, len(blocks)):
            self._parks.append(Move(sequence, blocks, 0, sequence.num_computed))

    def come_back(self, sequence: Sequence) -> int:
        """Give a sequence blocks for what is parked of it and was not found otherwise; the tokens in them."""
        parked = sequence.parked
        if parked is None or sequence in self._restores:
            return 0
        before, end = sequence.num_computed, self._pool.blocks_for(parked.tokens)
        dropped = end - parked.blocks
        first = max(dropped, len(sequence.blocks))
        if parked.tokens <= before or end - first > self._pool.num_available:
            sequence.parked = None
            return 0
        drop(sequence, dropped, self._pool)
        blocks = [block for _ in range(end - first) if (block := self._pool.take()) is not None]
        sequence.blocks += blocks
        sequence.num_computed = parked.tokens
        self._restores[sequence] = Move(sequence, tuple(blocks), first - dropped, parked.tokens)
        return parked.tokens - before

    def is_back(self, sequence: Sequence) -> bool:
        """Whether this step restores its blocks."""
        return sequence in self._restores

    def pays(self, tokens: int, blocks: int) -> bool:
        """Whether two copies take less time than computing; the first ones are made to see."""
        return 2 * blocks * self._seconds_per_block < tokens * self._seconds_per_token

    def saw_computing(self, tokens: int, seconds: float) -> None:
        self._seconds_per_token = _mean(self._seconds_per_token, seconds / tokens)

    def saw_copying(self, blocks: int, seconds: float) -> None:
        self._seconds_per_block = _mean(self._seconds_per_block, seconds / blocks)


def _mean(before: float, newest: float) -> float:
    return newest if before == 0 else before + _NEWEST * (newest - before)
